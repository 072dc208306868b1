#define JAXLORA_ISA amxbf16
#include "isa.h"

namespace jaxlora {
extern const Kernels kAmxBf16 = JAXLORA_TABLE("amxbf16");
}
