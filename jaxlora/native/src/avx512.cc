#define JAXLORA_ISA avx512
#include "isa.h"

namespace jaxlora {
extern const Kernels kAvx512 = JAXLORA_TABLE("avx512");
}
