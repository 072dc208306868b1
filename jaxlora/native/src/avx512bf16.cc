#define JAXLORA_ISA avx512bf16
#include "isa.h"

namespace jaxlora {
extern const Kernels kAvx512Bf16 = JAXLORA_TABLE("avx512bf16");
}
