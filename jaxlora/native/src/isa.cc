// The kernels of one instruction set, JAXLORA_ISA: a library of their own, which is compiled where that set is wanted.
#include <immintrin.h>
#include <stdlib.h>

#include <type_traits>

#include "kernels.h"

namespace jaxlora {
namespace {

#include "simd.h"
#include "memory.h"
#include "linear.h"
#include "compact.h"
#include "tiles.h"
#include "halves.h"
#include "int8.h"
#include "norm.h"
#include "attention_tiles.h"
#include "attention.h"
#include "causal.h"
#include "adapted.h"
#include "lora.h"
#include "lora_tiles.h"
#include "logits.h"
#include "draw.h"
#include "swiglu.h"

#define JAXLORA_NAME(isa) #isa
#define JAXLORA_NAME_OF(isa) JAXLORA_NAME(isa)

constexpr Kernels kKernels = {
    JAXLORA_NAME_OF(JAXLORA_ISA),
    kPanel,
    kRoundedTo,
    kLoraRounded,
    kFetchesLater,
    sizeof(Quantized),
    round_rows,
    linear_f32,
    linear_bf16,
    linear_compact,
    drop,
    project_rows,
    project_columns,
    halve_rows,
    linear_f16,
    quantize_rows,
    linear_i8,
    store_new<float>,
    store_new<uint16_t>,
    attend<float>,
    attend<uint16_t>,
    causal,
    causal_gradient,
    lora_down<WideLora<float>>,
    lora_down_bf16,
    lora_down<WideLora<int8_t>>,
    lora_up<WideLora<float>>,
    lora_up_bf16,
    lora_up<WideLora<int8_t>>,
    summarize,
    log_prob,
    log_prob_slopes,
    draw,
    rms_norm,
    rms_norm_gradient,
    swiglu,
    swiglu_gradient,
};

}  // namespace
}  // namespace jaxlora

extern "C" const jaxlora::Kernels* jaxlora_kernels() {
  return &jaxlora::kKernels;
}
