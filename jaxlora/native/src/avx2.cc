#define JAXLORA_ISA avx2
#include "isa.h"

namespace jaxlora {
extern const Kernels kAvx2 = JAXLORA_TABLE("avx2");
}
