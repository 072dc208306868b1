// Which instruction set the kernels are taken from.
#include <cstring>

#ifdef JAXLORA_AMXBF16
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#include "pool.h"

namespace jaxlora {

const Kernels* active = nullptr;

namespace {

struct Isa {
  const Kernels* kernels;
  bool (*supported)();
  bool (*pays)();  // whether it's taken where none is asked for
};

bool avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

// All CPUs that have one of the first three sets have it.
bool vnni() {
  return avx512() && __builtin_cpu_supports("avx512vnni");
}

#ifdef JAXLORA_AMXBF16
// Linux gives a process its tiles where it asks for them (https://docs.kernel.org/arch/x86/xstate.html).
bool amx() {
#ifdef EMULATION
  return true;
#endif
  constexpr long kAsk = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) && !syscall(SYS_arch_prctl, kAsk, kTileData);
}
#endif

// Best first. A set that the compiler or the CPU does not know is left out of the build. On Intel's cores a dot product of bfloat16 pairs
// takes four times as long as a fused multiply-add (Emerald Rapids: 0.65 and 0.16 ns), so that widening the weights is twice as
// fast.
const Isa kIsas[] = {
#ifdef JAXLORA_AMXBF16
    {&kAmxBf16, [] { return vnni() && __builtin_cpu_supports("avx512bf16") && amx(); }, [] { return true; }},
#endif
#ifdef JAXLORA_AVX512FP16
    {&kAvx512Fp16, [] { return vnni() && __builtin_cpu_supports("avx512fp16"); }, [] { return true; }},
#endif
#ifdef JAXLORA_AVX512BF16
    {&kAvx512Bf16, [] { return vnni() && __builtin_cpu_supports("avx512bf16"); }, [] { return !__builtin_cpu_is("intel"); }},
#endif
#ifdef JAXLORA_AVX512
    {&kAvx512, avx512, [] { return true; }},
#endif
#ifdef JAXLORA_AVX2
    {&kAvx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, [] { return true; }},
#endif
    {nullptr, nullptr, nullptr},
};

}  // namespace
}  // namespace jaxlora

// Takes the named instruction set, or the best one for an empty name; returns its name, or "" where this machine lacks it.
extern "C" const char* jaxlora_select(const char* wanted) {
  for (const jaxlora::Isa& isa : jaxlora::kIsas) {
    if (isa.kernels && isa.supported() && (*wanted ? !std::strcmp(wanted, isa.kernels->name) : isa.pays())) {
      jaxlora::active = isa.kernels;
      return isa.kernels->name;
    }
  }
  return "";
}

// Columns of a panel of packed weights, for the instruction set that was taken.
extern "C" int jaxlora_panel() {
  return jaxlora::active->panel;
}

extern "C" int jaxlora_threads() {
  return jaxlora::Pool::instance().threads();
}
