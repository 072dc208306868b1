// Products with frozen weights and the adapter that is being trained, and their gradient: handlers that XLA calls.
#include "product.h"

namespace jaxlora {
namespace {

using Shape = ffi::Span<const int64_t>;

bool trains_with(const ffi::AnyBuffer& w) {
  return w.element_type() == ffi::F32 || w.element_type() == ffi::U32;
}

// `b` of an update, packed to panels for y [m, n]; h is [m, ranks].
bool fits(Shape h, Shape b, int64_t m, int64_t n) {
  return h.size() == 2 && b.size() == 3 && h[0] == m && b[0] == panels(n) && b[1] == h[1] && b[2] == active->panel && h[1] % 16 == 0;
}

void project_rows(const float* x, const float* w, float* y, int64_t m, int64_t k, int64_t columns) {
  const int64_t block = 56;
  Pool::instance().split((m + block - 1) / block, [&](int64_t begin, int64_t end) {
    active->project_rows(x, w, y, k, columns, begin * block, end * block < m ? end * block : m);
  });
}

// y = x @ w + h @ b with h = x @ a.
ffi::Error adapted(F32 x, ffi::AnyBuffer w, F32 a, F32 b, F32Result y, F32Result h) {
  const auto xs = x.dimensions(), ys = y->dimensions(), as = a.dimensions(), hs = h->dimensions();
  if (xs.size() != 2 || ys.size() != 2 || xs[0] != ys[0] || !trains_with(w)) return bad("adapted takes x [m, k], packed w and y [m, n]");
  const int64_t m = xs[0], k = xs[1], n = ys[1];
  if (as.size() != 2 || as[0] != k || as[1] != hs.back() || !fits(hs, b.dimensions(), m, n)) return bad("the update has another shape");
  project_rows(x.typed_data(), a.typed_data(), h->typed_data(), m, k, as[1]);
  const Rows rows = prepare({x.typed_data(), m, k}, form_for(w));
  return multiply(rows, w, y->typed_data(), m, k, n, false, {h->typed_data(), b.typed_data(), as[1]});
}

// Of `slope` [m, n] with respect to y: dx = slope @ w + dh @ a with dh = slope @ b, da = dh^T @ x and db = h^T @ slope, for w, a and b
// transposed with respect to `adapted`: w packed of [n, k], a packed of [ranks, k], b plain [n, ranks].
ffi::Error adapted_gradient(F32 x, F32 h, ffi::AnyBuffer w, F32 a, F32 b, F32 slope, F32Result dx, F32Result da, F32Result db) {
  const auto ss = slope.dimensions(), xs = x.dimensions(), bs = b.dimensions(), hs = h.dimensions();
  if (ss.size() != 2 || xs.size() != 2 || ss[0] != xs[0] || !trains_with(w)) return bad("adapted_gradient takes x [m, k] and slope [m, n]");
  const int64_t m = xs[0], k = xs[1], n = ss[1];
  if (bs.size() != 2 || bs[0] != n || bs[1] != hs.back() || !fits(hs, a.dimensions(), m, k) || k % 16 || n % 16) {
    return bad("the update has another shape");
  }
  const int64_t ranks = bs[1];
  auto* dh = static_cast<float*>(scratch.reserve(static_cast<size_t>(m * ranks) * sizeof(float)));
  project_rows(slope.typed_data(), b.typed_data(), dh, m, n, ranks);
  const Rows rows = prepare({slope.typed_data(), m, n}, form_for(w));
  if (auto error = multiply(rows, w, dx->typed_data(), m, n, k, false, {dh, a.typed_data(), ranks}); error.failure()) return error;
  auto blocks = [](int64_t columns) { return (columns + kProjectedColumns - 1) / kProjectedColumns; };
  const int64_t of_a = blocks(k);
  Pool::instance().split(of_a + blocks(n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i < of_a) {
        active->project_columns(dh, x.typed_data(), da->typed_data(), m, ranks, k, i);
      } else {
        active->project_columns(h.typed_data(), slope.typed_data(), db->typed_data(), m, ranks, n, i - of_a);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_adapted, adapted,
                              Ffi::Bind().Arg<F32>().Arg<ffi::AnyBuffer>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxlora_adapted_gradient, adapted_gradient,
    Ffi::Bind().Arg<F32>().Arg<F32>().Arg<ffi::AnyBuffer>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>().Ret<F32>());

}  // namespace jaxlora
