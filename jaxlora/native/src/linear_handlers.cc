// Products with packed weights: handlers that XLA calls. They check shapes and share the work among the threads of the pool.
#include "handlers.h"
#include "order.h"

namespace jaxlora {
namespace {

using Shape = ffi::Span<const int64_t>;

// An error unless y [m, n] = x [m, k] @ w fits, with w packed to panels of steps that take `k_of_step` values of x each.
ffi::Error check(Shape x, Shape w, Shape y, int64_t k_of_step) {
  if (x.size() != 2 || w.size() != 3 || y.size() != 2) return bad("linear takes x [m, k], packed w and y [m, n]");
  if (y[0] != x[0] || w[0] != panels(y[1]) || w[1] != (x[1] + k_of_step - 1) / k_of_step || w[2] != kPanel) {
    return bad("the weights were packed for another shape");
  }
  return ffi::Error::Success();
}

// Shares the panels of w [k, n], of `bytes` each, among the threads.
template <typename Body>
void multiply(const void* w, int64_t bytes, int64_t m, int64_t n, const Body& body, int64_t grain = 1) {
  Order::instance().reading(w, static_cast<size_t>(panels(n) * bytes));
  Pool::instance().split((m + kRowBlock - 1) / kRowBlock * panels(n), body, grain);
}

// Values of x that one step of packed weights takes.
template <bool kBf16>
constexpr int64_t kStep = kBf16 ? 2 : 1;

// y = x @ w + update, for weights in float32 or bfloat16. `space` holds what `rows_space` says.
template <bool kBf16>
void product(const float* x, const void* w, float* y, int64_t m, int64_t k, int64_t n, const Update& update, void* space) {
  const Linear a{rows_for(kBf16, x, m, k, space), w, y, m, k, n, update};
  multiply(w, kPanel * k * (kBf16 ? 2 : 4), m, n,
           [&](int64_t begin, int64_t end) { (kBf16 ? active->linear_bf16 : active->linear_f32)(a, begin, end); });
}

template <bool kBf16>
ffi::Error linear(F32 x, ffi::AnyBuffer w, F32Result y) {
  const auto xs = x.dimensions(), ys = y->dimensions();
  if (auto error = check(xs, w.dimensions(), ys, kStep<kBf16>); error.failure()) return error;
  const int64_t m = xs[0], k = xs[1];
  product<kBf16>(x.typed_data(), w.untyped_data(), y->typed_data(), m, k, ys[1], {}, scratch.reserve(rows_space(kBf16, m, k)));
  return ffi::Error::Success();
}

ffi::Error linear_f16(F32 x, ffi::Buffer<ffi::F16> w, F32Result y) {
  const auto xs = x.dimensions(), ys = y->dimensions();
  if (!active->linear_f16) return bad(std::string("weights packed as float16 can't be read by ") + active->name);
  if (auto error = check(xs, w.dimensions(), ys, 1); error.failure()) return error;
  const int64_t m = xs[0], k = xs[1], n = ys[1];
  auto* halves = static_cast<uint32_t*>(scratch.reserve(static_cast<size_t>(m * k + m) * sizeof(uint32_t)));
  auto* scales = reinterpret_cast<float*>(halves + m * k);
  prepare_rows(m, k, [&](int64_t begin, int64_t end) { active->halve_rows(x.typed_data(), halves, scales, k, begin, end); });
  const LinearF16 a{halves, scales, static_cast<const uint16_t*>(w.untyped_data()), y->typed_data(), m, k, n};
  multiply(a.w, kPanel * k * 2, m, n, [&](int64_t begin, int64_t end) { active->linear_f16(a, begin, end); }, 2);
  return ffi::Error::Success();
}

ffi::Error linear_i8(F32 x, ffi::Buffer<ffi::U8> w, F32Result y) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 3 || ys.size() != 2) return bad("linear takes x [m, k], packed w and y [m, n]");
  const int64_t m = xs[0], k = xs[1], n = ys[1], groups = (k + kGroup - 1) / kGroup;
  if (ys[0] != m || ws[0] != panels(n) || ws[1] != groups || ws[2] != kGroupBytes) return bad("the weights were packed for another shape");
  auto* values = static_cast<int8_t*>(scratch.reserve(static_cast<size_t>(m * groups) * (kGroup + sizeof(float) + sizeof(int32_t))));
  auto* scales = reinterpret_cast<float*>(values + m * groups * kGroup);
  auto* offsets = reinterpret_cast<int32_t*>(scales + m * groups);
  prepare_rows(m, k, [&](int64_t begin, int64_t end) { active->quantize_rows(x.typed_data(), values, scales, offsets, k, begin, end); });
  const LinearI8 a{values, scales, offsets, w.typed_data(), y->typed_data(), m, groups, n};
  multiply(a.w, groups * kGroupBytes, m, n, [&](int64_t begin, int64_t end) { active->linear_i8(a, begin, end); });
  return ffi::Error::Success();
}

// `b` of an update, packed to panels for y [m, n]; h is [m, ranks].
bool fits(Shape h, Shape b, int64_t m, int64_t n) {
  return h.size() == 2 && b.size() == 3 && h[0] == m && b[0] == panels(n) && b[1] == h[1] && b[2] == kPanel && h[1] % 16 == 0;
}

void project_rows(const float* x, const float* w, float* y, int64_t m, int64_t k, int64_t columns) {
  const int64_t block = 56;
  Pool::instance().split((m + block - 1) / block, [&](int64_t begin, int64_t end) {
    active->project_rows(x, w, y, k, columns, begin * block, end * block < m ? end * block : m);
  });
}

// y = x @ w + h @ b with h = x @ a.
template <bool kBf16>
ffi::Error adapted(F32 x, ffi::AnyBuffer w, F32 a, F32 b, F32Result y, F32Result h) {
  const auto xs = x.dimensions(), ys = y->dimensions(), as = a.dimensions(), hs = h->dimensions();
  if (auto error = check(xs, w.dimensions(), ys, kStep<kBf16>); error.failure()) return error;
  const int64_t m = xs[0], k = xs[1], n = ys[1];
  if (as.size() != 2 || as[0] != k || as[1] != hs.back() || !fits(hs, b.dimensions(), m, n)) return bad("the update has another shape");
  project_rows(x.typed_data(), a.typed_data(), h->typed_data(), m, k, as[1]);
  product<kBf16>(x.typed_data(), w.untyped_data(), y->typed_data(), m, k, n, {h->typed_data(), b.typed_data(), as[1]},
                 scratch.reserve(rows_space(kBf16, m, k)));
  return ffi::Error::Success();
}

// Of `slope` [m, n] with respect to y: dx = slope @ w + dh @ a with dh = slope @ b, da = dh^T @ x and db = h^T @ slope, for w, a and b
// transposed with respect to `adapted`: w packed of [n, k], a packed of [ranks, k], b plain [n, ranks].
template <bool kBf16>
ffi::Error adapted_gradient(F32 x, F32 h, ffi::AnyBuffer w, F32 a, F32 b, F32 slope, F32Result dx, F32Result da, F32Result db) {
  const auto ss = slope.dimensions(), xs = x.dimensions(), bs = b.dimensions(), hs = h.dimensions();
  if (auto error = check(ss, w.dimensions(), xs, kStep<kBf16>); error.failure()) return error;
  const int64_t m = xs[0], k = xs[1], n = ss[1];
  if (bs.size() != 2 || bs[0] != n || bs[1] != hs.back() || !fits(hs, a.dimensions(), m, k) || k % 16 || n % 16) {
    return bad("the update has another shape");
  }
  const int64_t ranks = bs[1], block = 64, of_a = (k + block - 1) / block, of_b = (n + block - 1) / block;
  auto* dh = static_cast<float*>(scratch.reserve(static_cast<size_t>(m * ranks) * sizeof(float) + rows_space(kBf16, m, n)));
  project_rows(slope.typed_data(), b.typed_data(), dh, m, n, ranks);
  product<kBf16>(slope.typed_data(), w.untyped_data(), dx->typed_data(), m, n, k, {dh, a.typed_data(), ranks}, dh + m * ranks);
  auto columns = [&](const float* rows, const float* from, float* to, int64_t width, int64_t begin, int64_t end) {
    active->project_columns(rows, from, to, m, ranks, width, begin * block, end * block < width ? end * block : width);
  };
  Pool::instance().split(of_a + of_b, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i < of_a) {
        columns(dh, x.typed_data(), da->typed_data(), k, i, i + 1);
      } else {
        columns(h.typed_data(), slope.typed_data(), db->typed_data(), n, i - of_a, i - of_a + 1);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#define JAXLORA_LINEAR Ffi::Bind().Arg<F32>().Arg<ffi::AnyBuffer>().Ret<F32>()
#define JAXLORA_ADAPTED Ffi::Bind().Arg<F32>().Arg<ffi::AnyBuffer>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>()
#define JAXLORA_ADAPTED_GRADIENT                                                                                       \
  Ffi::Bind().Arg<F32>().Arg<F32>().Arg<ffi::AnyBuffer>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>().Ret<F32>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_linear_f32, linear<false>, JAXLORA_LINEAR);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_linear_bf16, linear<true>, JAXLORA_LINEAR);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_linear_f16, linear_f16, Ffi::Bind().Arg<F32>().Arg<ffi::Buffer<ffi::F16>>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_linear_i8, linear_i8, Ffi::Bind().Arg<F32>().Arg<ffi::Buffer<ffi::U8>>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_adapted_f32, adapted<false>, JAXLORA_ADAPTED);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_adapted_bf16, adapted<true>, JAXLORA_ADAPTED);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_adapted_gradient_f32, adapted_gradient<false>, JAXLORA_ADAPTED_GRADIENT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_adapted_gradient_bf16, adapted_gradient<true>, JAXLORA_ADAPTED_GRADIENT);

}  // namespace jaxlora
