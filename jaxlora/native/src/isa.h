// Compiled once for each instruction set, by the .cc file that names it.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "kernels.h"

namespace jaxlora {
namespace JAXLORA_ISA {
namespace {

#include "simd.h"
#include "memory.h"
#include "linear.h"
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

}  // namespace
}  // namespace JAXLORA_ISA

#define JAXLORA_TABLE(name)          \
  {name,                             \
   JAXLORA_ISA::kPanel,              \
   JAXLORA_ISA::kRoundedTo,          \
   JAXLORA_ISA::kLoraRounded,        \
   JAXLORA_ISA::round_rows,          \
   JAXLORA_ISA::linear_f32,          \
   JAXLORA_ISA::linear_bf16,         \
   JAXLORA_ISA::project_rows,        \
   JAXLORA_ISA::project_columns,     \
   JAXLORA_ISA::halve_rows,          \
   JAXLORA_ISA::linear_f16,          \
   JAXLORA_ISA::quantize_rows,       \
   JAXLORA_ISA::linear_i8,           \
   JAXLORA_ISA::store_new<float>,    \
   JAXLORA_ISA::store_new<uint16_t>, \
   JAXLORA_ISA::attend<float>,       \
   JAXLORA_ISA::attend<uint16_t>,    \
   JAXLORA_ISA::causal,              \
   JAXLORA_ISA::causal_gradient,     \
   JAXLORA_ISA::lora_down<JAXLORA_ISA::WideLora<float>>,  \
   JAXLORA_ISA::lora_down_bf16,                          \
   JAXLORA_ISA::lora_down<JAXLORA_ISA::WideLora<int8_t>>, \
   JAXLORA_ISA::lora_up<JAXLORA_ISA::WideLora<float>>,    \
   JAXLORA_ISA::lora_up_bf16,                            \
   JAXLORA_ISA::lora_up<JAXLORA_ISA::WideLora<int8_t>>,   \
   JAXLORA_ISA::summarize, JAXLORA_ISA::draw, JAXLORA_ISA::rms_norm, JAXLORA_ISA::swiglu}

}  // namespace jaxlora
