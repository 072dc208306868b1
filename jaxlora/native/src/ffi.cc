// The handlers that XLA calls: they check shapes, cut a call into items and share these among the threads of the pool.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace jaxlora {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

struct Isa {
  const Kernels* kernels;
  bool (*supported)();
  bool (*pays)();  // whether it's taken where none is asked for
};

bool avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

// Best first. A set that the compiler does not know is left out of the build. On Intel's cores a dot product of bfloat16 pairs
// takes four times as long as a fused multiply-add (Emerald Rapids: 0.65 and 0.16 ns), so that widening the weights is twice as
// fast.
const Isa kIsas[] = {
#ifdef JAXLORA_AVX512FP16
    {&kAvx512Fp16, [] { return avx512() && __builtin_cpu_supports("avx512fp16"); }, [] { return true; }},
#endif
#ifdef JAXLORA_AVX512BF16
    {&kAvx512Bf16, [] { return avx512() && __builtin_cpu_supports("avx512bf16"); }, [] { return !__builtin_cpu_is("intel"); }},
#endif
#ifdef JAXLORA_AVX512
    {&kAvx512, avx512, [] { return true; }},
#endif
#ifdef JAXLORA_AVX2
    {&kAvx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, [] { return true; }},
#endif
    {nullptr, nullptr, nullptr},
};

const Kernels* active = nullptr;

ffi::Error bad(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "jaxlora native: " + message);
}

// Memory that a calling thread keeps from one call to the next.
class Scratch {
 public:
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, size_);
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch scratch;

constexpr int64_t kSerial = 1 << 14;  // values below which waking a worker costs more than it saves

template <bool kBf16>
ffi::Error linear(F32 x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> y) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 3 || ys.size() != 2) return bad("linear takes x [m, k], packed w and y [m, n]");
  Linear a{x.untyped_data(), w.untyped_data(), y->typed_data(), xs[0], xs[1], ys[1]};
  if (ys[0] != a.m || ws[0] != panels(a.n) || ws[1] != (kBf16 ? (a.k + 1) / 2 : a.k) || ws[2] != kPanel) {
    return bad("the weights were packed for another shape");
  }
  Pool& pool = Pool::instance();
  if (kBf16 && active->round_rows) {
    auto* rounded = static_cast<uint16_t*>(scratch.reserve(static_cast<size_t>(a.m * ((a.k + 1) / 2 * 2)) * sizeof(uint16_t)));
    auto round = [&](int64_t begin, int64_t end) { active->round_rows(x.typed_data(), rounded, a.k, begin, end); };
    if (a.m * a.k < kSerial) {
      round(0, a.m);
    } else {
      pool.split(a.m, round, 16);
    }
    a.x = rounded;
  }
  const int64_t items = (a.m + kRowBlock - 1) / kRowBlock * panels(a.n);
  pool.split(items, [&](int64_t begin, int64_t end) { (kBf16 ? active->linear_bf16 : active->linear_f32)(a, begin, end); });
  return ffi::Error::Success();
}

ffi::Error linear_f16(F32 x, ffi::Buffer<ffi::F16> w, ffi::ResultBuffer<ffi::F32> y) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (!active->linear_f16) return bad(std::string("weights packed as float16 can't be read by ") + active->name);
  if (xs.size() != 2 || ws.size() != 3 || ys.size() != 2) return bad("linear takes x [m, k], packed w and y [m, n]");
  const int64_t m = xs[0], k = xs[1], n = ys[1];
  if (ys[0] != m || ws[0] != panels(n) || ws[1] != k || ws[2] != kPanel) return bad("the weights were packed for another shape");
  auto* halves = static_cast<uint32_t*>(scratch.reserve(static_cast<size_t>(m * k + m) * sizeof(uint32_t)));
  auto* scales = reinterpret_cast<float*>(halves + m * k);
  Pool& pool = Pool::instance();
  auto halve = [&](int64_t begin, int64_t end) { active->halve_rows(x.typed_data(), halves, scales, k, begin, end); };
  if (m * k < kSerial) {
    halve(0, m);
  } else {
    pool.split(m, halve, 16);
  }
  const LinearF16 a{halves, scales, static_cast<const uint16_t*>(w.untyped_data()), y->typed_data(), m, k, n};
  const int64_t items = (m + kRowBlock - 1) / kRowBlock * panels(n);
  pool.split(items, [&](int64_t begin, int64_t end) { active->linear_f16(a, begin, end); }, 2);
  return ffi::Error::Success();
}

ffi::Error attention(F32 q, F32 k_new, F32 v_new, ffi::AnyBuffer k_cache, ffi::AnyBuffer v_cache, S32 starts, S32 lengths,
                     S32 slots, ffi::ResultBuffer<ffi::F32> out, ffi::Result<ffi::AnyBuffer> k_result,
                     ffi::Result<ffi::AnyBuffer> v_result, int64_t window, float scale) {
  const auto qs = q.dimensions(), ns = k_new.dimensions(), cs = k_cache.dimensions();
  auto same = [](auto a, auto b) { return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()); };
  if (qs.size() != 4 || ns.size() != 4 || cs.size() != 4)
    return bad("attention takes q [b, t, h, d] and caches [slots, kv, s, d]");
  Attention a{};
  a.b = qs[0], a.t = qs[1], a.heads = qs[2], a.d = qs[3], a.kv = ns[2], a.s = cs[2];
  if (ns[0] != a.b || ns[1] != a.t || ns[3] != a.d || cs[1] != a.kv || cs[3] != a.d || a.kv == 0 || a.heads % a.kv ||
      !same(v_new.dimensions(), ns) || !same(v_cache.dimensions(), cs) || a.d % 16 || a.d > kMaxHead) {
    return bad("shapes of queries, keys, values and caches do not fit");
  }
  if (starts.element_count() != static_cast<size_t>(a.b) || lengths.element_count() != starts.element_count() ||
      slots.element_count() != starts.element_count()) {
    return bad("starts, lengths and slots take one number a row");
  }
  if (k_result->untyped_data() != k_cache.untyped_data() || v_result->untyped_data() != v_cache.untyped_data()) {
    return bad("the caches are not updated in place");
  }
  const bool bf16 = k_cache.element_type() == ffi::BF16;
  if ((!bf16 && k_cache.element_type() != ffi::F32) || v_cache.element_type() != k_cache.element_type()) {
    return bad("caches are float32 or bfloat16");
  }
  a.q = q.typed_data(), a.k_new = k_new.typed_data(), a.v_new = v_new.typed_data(), a.out = out->typed_data();
  a.k_cache = k_cache.untyped_data(), a.v_cache = v_cache.untyped_data();
  a.starts = starts.typed_data(), a.lengths = lengths.typed_data(), a.slots = slots.typed_data();
  a.window = window, a.scale = scale;
  int64_t tokens = 0;
  for (int64_t b = 0; b < a.b; ++b) {
    if (a.lengths[b] <= 0) continue;
    tokens += a.lengths[b];
    if (a.lengths[b] > a.t || a.starts[b] < 0 || a.starts[b] + a.lengths[b] > a.s || a.slots[b] < 0 || a.slots[b] >= cs[0]) {
      return bad("row " + std::to_string(b) + " lies outside of the cache");
    }
  }
  Pool& pool = Pool::instance();
  const int64_t group = a.heads / a.kv;
  a.tile = kTileQueries / group > 0 ? kTileQueries / group : 1;
  auto store = [&](int64_t begin, int64_t end) { (bf16 ? active->store_new_bf16 : active->store_new_f32)(a, begin, end); };
  if (tokens * a.kv * a.d < kSerial) {
    store(0, a.b * a.kv);
  } else {
    pool.split(a.b * a.kv, store);
  }
  pool.split(a.b * ((a.t + a.tile - 1) / a.tile) * a.kv,
             [&](int64_t begin, int64_t end) { (bf16 ? active->attend_bf16 : active->attend_f32)(a, begin, end); });
  return ffi::Error::Success();
}

ffi::Error lora(F32 y_in, F32 x, ffi::AnyBuffer bank, S32 row_slot, S32 rank, ffi::ResultBuffer<ffi::F32> y,
                ffi::Span<const int64_t> a_offsets, ffi::Span<const int64_t> b_offsets, ffi::Span<const int64_t> columns,
                ffi::Span<const int64_t> widths, int64_t ranks) {
  const auto xs = x.dimensions(), ys = y->dimensions(), bs = bank.dimensions();
  if (xs.size() != 2 || ys.size() != 2 || bs.size() != 2 || xs[0] != ys[0])
    return bad("lora takes y [m, n], x [m, k], bank [slots, size]");
  if (y->untyped_data() != y_in.untyped_data()) return bad("y is not updated in place");
  const bool bf16 = bank.element_type() == ffi::BF16;
  if (!bf16 && bank.element_type() != ffi::F32) return bad("the bank is float32 or bfloat16");
  const int64_t m = xs[0], k = xs[1], n = ys[1], slots = bs[0];
  if (row_slot.element_count() != static_cast<size_t>(m)) return bad("row_slot takes one number a row");
  if (rank.element_count() != static_cast<size_t>(slots)) return bad("rank takes one number a slot");

  std::vector<LoraModule> modules;
  for (size_t i = 0; i < a_offsets.size(); ++i) {
    LoraModule module{a_offsets[i], b_offsets[i], columns[i], widths[i]};
    if (module.a < 0 || module.b < 0 || module.column < 0 || module.a + ranks * k > bs[1] ||
        module.b + ranks * module.n > bs[1] || module.column + module.n > n) {
      return bad("module " + std::to_string(i) + " lies outside of the bank or of y");
    }
    modules.push_back(module);
  }

  // Rows in the order of their slots: a count, then their places.
  std::vector<int64_t> place(static_cast<size_t>(slots) + 1), rows(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) {
    int32_t slot = row_slot.typed_data()[i];
    if (slot >= slots)
      return bad("row " + std::to_string(i) + " names slot " + std::to_string(slot) + " of " + std::to_string(slots));
    if (slot >= 0) ++place[static_cast<size_t>(slot) + 1];
  }
  std::vector<LoraGroup> groups;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t begin = place[static_cast<size_t>(slot)], count = place[static_cast<size_t>(slot) + 1];
    const int64_t true_rank = rank.typed_data()[slot];
    if (count && true_rank > ranks) return bad("slot " + std::to_string(slot) + " has a rank above the bank's");
    if (count && true_rank > 0) groups.push_back({slot, true_rank, begin, begin + count});
    place[static_cast<size_t>(slot) + 1] += begin;
  }
  for (int64_t i = 0; i < m; ++i) {
    int32_t slot = row_slot.typed_data()[i];
    if (slot >= 0) rows[static_cast<size_t>(place[static_cast<size_t>(slot)]++)] = i;
  }
  if (groups.empty()) return ffi::Error::Success();

  std::vector<LoraItem> down, up;
  for (size_t g = 0; g < groups.size(); ++g) {
    for (size_t i = 0; i < modules.size(); ++i) {
      const auto group = static_cast<int64_t>(g), module = static_cast<int64_t>(i);
      for (int64_t r = 0; r < groups[g].rank; r += kRankBlock) down.push_back({group, module, r});
      for (int64_t c = 0; c < modules[i].n; c += kColumnBlock) up.push_back({group, module, c});
    }
  }
  float* hidden = static_cast<float*>(scratch.reserve(modules.size() * static_cast<size_t>(m * ranks) * sizeof(float)));
  const Lora l{x.typed_data(),
               bank.untyped_data(),
               hidden,
               y->typed_data(),
               rows.data(),
               groups.data(),
               modules.data(),
               down.data(),
               up.data(),
               static_cast<int64_t>(down.size()),
               static_cast<int64_t>(up.size()),
               bs[1],
               m,
               k,
               n,
               ranks};
  Pool& pool = Pool::instance();
  pool.split(l.down_count,
             [&](int64_t begin, int64_t end) { (bf16 ? active->lora_down_bf16 : active->lora_down_f32)(l, begin, end); });
  pool.split(l.up_count, [&](int64_t begin, int64_t end) { (bf16 ? active->lora_up_bf16 : active->lora_up_f32)(l, begin, end); });
  return ffi::Error::Success();
}

ffi::Error summarize(F32 logits, ffi::ResultBuffer<ffi::S32> argmax, ffi::ResultBuffer<ffi::F32> logsumexp) {
  const auto shape = logits.dimensions();
  if (shape.size() != 2 || shape[1] == 0 || argmax->element_count() != static_cast<size_t>(shape[0]) ||
      logsumexp->element_count() != argmax->element_count()) {
    return bad("summarize takes logits [m, n]");
  }
  Pool::instance().split(shape[0], [&](int64_t begin, int64_t end) {
    active->summarize(logits.typed_data(), argmax->typed_data(), logsumexp->typed_data(), shape[1], begin, end);
  });
  return ffi::Error::Success();
}

constexpr int64_t kShared = 64;  // rows from which it pays to wake the other threads: a norm of fewer takes microseconds

ffi::Error rms_norm(F32 x, F32 scale, ffi::ResultBuffer<ffi::F32> y, float eps) {
  const auto shape = x.dimensions();
  if (shape.size() != 2 || scale.element_count() != static_cast<size_t>(shape[1]) || y->element_count() != x.element_count()) {
    return bad("rms_norm takes x [m, n] and scale [n]");
  }
  auto rows = [&](int64_t begin, int64_t end) {
    active->rms_norm(x.typed_data(), scale.typed_data(), eps, y->typed_data(), shape[1], begin, end);
  };
  if (shape[0] < kShared) {
    rows(0, shape[0]);
  } else {
    Pool::instance().split(shape[0], rows);
  }
  return ffi::Error::Success();
}

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

extern "C" int jaxlora_threads() {
  return jaxlora::Pool::instance().threads();
}

namespace jaxlora {

#define JAXLORA_LINEAR Ffi::Bind().Arg<F32>().Arg<ffi::AnyBuffer>().Ret<F32>()
using xla::ffi::Ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_linear_f32, linear<false>, JAXLORA_LINEAR);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_linear_bf16, linear<true>, JAXLORA_LINEAR);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_linear_f16, linear_f16,
                              Ffi::Bind().Arg<F32>().Arg<ffi::Buffer<ffi::F16>>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_attention, attention,
                              Ffi::Bind()
                                  .Arg<F32>()             // q
                                  .Arg<F32>()             // k_new
                                  .Arg<F32>()             // v_new
                                  .Arg<ffi::AnyBuffer>()  // k_cache
                                  .Arg<ffi::AnyBuffer>()  // v_cache
                                  .Arg<S32>()             // starts
                                  .Arg<S32>()             // lengths
                                  .Arg<S32>()             // slots
                                  .Ret<F32>()             // out
                                  .Ret<ffi::AnyBuffer>()  // k_cache
                                  .Ret<ffi::AnyBuffer>()  // v_cache
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_lora, lora,
                              Ffi::Bind()
                                  .Arg<F32>()             // y
                                  .Arg<F32>()             // x
                                  .Arg<ffi::AnyBuffer>()  // bank
                                  .Arg<S32>()             // row_slot
                                  .Arg<S32>()             // rank
                                  .Ret<F32>()             // y
                                  .Attr<ffi::Span<const int64_t>>("a_offsets")
                                  .Attr<ffi::Span<const int64_t>>("b_offsets")
                                  .Attr<ffi::Span<const int64_t>>("columns")
                                  .Attr<ffi::Span<const int64_t>>("widths")
                                  .Attr<int64_t>("ranks"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxlora_rms_norm, rms_norm, Ffi::Bind().Arg<F32>().Arg<F32>().Ret<F32>().Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_summarize, summarize, Ffi::Bind().Arg<F32>().Ret<ffi::Buffer<ffi::S32>>().Ret<F32>());

}  // namespace jaxlora
