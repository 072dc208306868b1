#define JAXLORA_ISA avx512fp16
#include "isa.h"

namespace jaxlora {
extern const Kernels kAvx512Fp16 = JAXLORA_TABLE("avx512fp16");
}
