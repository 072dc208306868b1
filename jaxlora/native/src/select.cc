// Which instruction set the kernels are taken from.
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels.h"
#include "pool.h"

namespace jaxlora {

const Kernels* active = nullptr;

namespace {

// Linux gives a process its tiles where it asks for them (https://docs.kernel.org/arch/x86/xstate.html).
bool gets_tiles() {
#ifdef EMULATION
  return true;
#else
  constexpr long kAsk = 0x1023, kTileData = 18;
  return !syscall(SYS_arch_prctl, kAsk, kTileData);
#endif
}

}  // namespace
}  // namespace jaxlora

// Takes the kernels of an instruction set from now on; false where the system does not let this process use it.
extern "C" bool jaxlora_use(const jaxlora::Kernels* kernels) {
  if (!std::strcmp(kernels->name, "amxbf16") && !jaxlora::gets_tiles()) return false;
  jaxlora::active = kernels;
  return true;
}

// Columns of a panel of packed weights, for the instruction set in use.
extern "C" int jaxlora_panel() {
  return jaxlora::active->panel;
}

extern "C" int jaxlora_threads() {
  return jaxlora::Pool::instance().threads();
}
