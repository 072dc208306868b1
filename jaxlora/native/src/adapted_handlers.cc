// Products with frozen weights and the adapter that is being trained, and their gradient: handlers that XLA calls.
#include "product.h"

namespace jaxlora {
namespace {

using Shape = ffi::Span<const int64_t>;

bool trains_with(const ffi::AnyBuffer& w) {
  return w.element_type() == ffi::F32 || w.element_type() == ffi::U32;
}

// The adapter of a product of k inputs and n outputs: a [ranks, k] and b [n, ranks], as they lie in a file.
struct Adapter {
  const float *a, *b;
  int64_t k, n, ranks;
  float scale;

  int64_t padded() const { return (ranks + 15) / 16 * 16; }  // ranks filled up with zeros, so that they count as columns
};

bool read(Adapter& adapter, F32 a, F32 b, Shape h, int64_t m, int64_t k, int64_t n, float scale) {
  const auto as = a.dimensions(), bs = b.dimensions();
  if (as.size() != 2 || bs.size() != 2 || h.size() != 2) return false;
  adapter = {a.typed_data(), b.typed_data(), k, n, as[0], scale};
  return as[1] == k && bs[0] == n && bs[1] == as[0] && h[0] == m && h[1] == adapter.padded() && k % 16 == 0 && n % 16 == 0;
}

// to [columns, padded] = factor * from^T for from [ranks, columns] of which a value lies `step` from the next one of its rank.
void transpose(const float* from, int64_t of_rank, int64_t step, int64_t columns, int64_t ranks, int64_t padded, float factor, float* to) {
  for (int64_t i = 0; i < columns; ++i, from += step, to += padded) {
    for (int64_t rank = 0; rank < ranks; ++rank) to[rank] = factor * from[rank * of_rank];
    for (int64_t rank = ranks; rank < padded; ++rank) to[rank] = 0;
  }
}

// to [panels][padded][panel] = factor * from for such a from.
void pack(const float* from, int64_t of_rank, int64_t step, int64_t columns, int64_t ranks, int64_t padded, float factor, float* to) {
  const int64_t panel = active->panel;
  for (int64_t first = 0; first < columns; first += panel) {
    const int64_t filled = columns - first < panel ? columns - first : panel;
    for (int64_t rank = 0; rank < padded; ++rank, to += panel) {
      const int64_t count = rank < ranks ? filled : 0;
      const float* of = from + rank * of_rank + first * step;
      for (int64_t i = 0; i < count; ++i) to[i] = factor * of[i * step];
      for (int64_t i = count; i < panel; ++i) to[i] = 0;
    }
  }
}

void project_rows(const float* x, const float* w, float* y, int64_t m, int64_t k, int64_t columns) {
  const int64_t block = 56;
  Pool::instance().split((m + block - 1) / block, [&](int64_t begin, int64_t end) {
    active->project_rows(x, w, y, k, columns, begin * block, end * block < m ? end * block : m);
  });
}

float* reserve(int64_t values) {
  return static_cast<float*>(scratch.reserve(static_cast<size_t>(values) * sizeof(float)));
}

// y = x @ w + scale * h @ b^T with h = x @ a^T, which has zeros behind its ranks.
ffi::Error adapted(F32 x, ffi::AnyBuffer w, F32 a, F32 b, F32Result y, F32Result h, float scale) {
  const auto xs = x.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ys.size() != 2 || xs[0] != ys[0] || !trains_with(w)) return bad("adapted takes x [m, k], packed w and y [m, n]");
  const int64_t m = xs[0], k = xs[1], n = ys[1];
  Adapter of;
  if (!read(of, a, b, h->dimensions(), m, k, n, scale)) return bad("the adapter has another shape");
  const int64_t ranks = of.padded();
  float* const down = reserve((k + panels(n) * active->panel) * ranks);
  float* const up = down + k * ranks;
  transpose(of.a, k, 1, k, of.ranks, ranks, 1, down);
  pack(of.b, 1, of.ranks, n, of.ranks, ranks, scale, up);
  project_rows(x.typed_data(), down, h->typed_data(), m, k, ranks);
  const Rows rows = prepare({x.typed_data(), m, k}, form_for(w));
  return multiply(rows, w, y->typed_data(), m, k, n, false, {h->typed_data(), up, ranks});
}

// Of `slope` [m, n] with respect to y: dx = slope @ w^T + dh @ a with dh = scale * slope @ b, da = dh^T @ x and db = scale * slope^T @ h; w is
// packed transposed, of [n, k].
ffi::Error adapted_gradient(F32 x, F32 h, ffi::AnyBuffer w, F32 a, F32 b, F32 slope, F32Result dx, F32Result da, F32Result db, float scale) {
  const auto ss = slope.dimensions(), xs = x.dimensions();
  if (ss.size() != 2 || xs.size() != 2 || ss[0] != xs[0] || !trains_with(w)) return bad("adapted_gradient takes x [m, k] and slope [m, n]");
  const int64_t m = xs[0], k = xs[1], n = ss[1];
  Adapter of;
  if (!read(of, a, b, h.dimensions(), m, k, n, scale)) return bad("the adapter has another shape");
  const int64_t ranks = of.padded();
  float* const dh = reserve((m + 2 * n + panels(k) * active->panel) * ranks);
  float *const down = dh + m * ranks, *const db_transposed = down + n * ranks, *const up = db_transposed + n * ranks;
  transpose(of.b, 1, of.ranks, n, of.ranks, ranks, scale, down);
  pack(of.a, k, 1, k, of.ranks, ranks, 1, up);
  project_rows(slope.typed_data(), down, dh, m, n, ranks);
  const Rows rows = prepare({slope.typed_data(), m, n}, form_for(w));
  if (auto error = multiply(rows, w, dx->typed_data(), m, n, k, false, {dh, up, ranks}); error.failure()) return error;
  auto blocks = [](int64_t columns) { return (columns + kProjectedColumns - 1) / kProjectedColumns; };
  const int64_t of_a = blocks(k);
  Pool::instance().split(of_a + blocks(n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i < of_a) {
        active->project_columns(dh, ranks, x.typed_data(), da->typed_data(), m, of.ranks, k, i);
        continue;
      }
      active->project_columns(h.typed_data(), ranks, slope.typed_data(), db_transposed, m, of.ranks, n, i - of_a);
      const int64_t first = (i - of_a) * kProjectedColumns, columns = n - first < kProjectedColumns ? n - first : kProjectedColumns;
      transpose(db_transposed + first, n, 1, columns, of.ranks, of.ranks, scale, db->typed_data() + first * of.ranks);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_adapted, adapted,
                              Ffi::Bind().Arg<F32>().Arg<ffi::AnyBuffer>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>().Attr<float>("scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxlora_adapted_gradient, adapted_gradient,
    Ffi::Bind().Arg<F32>().Arg<F32>().Arg<ffi::AnyBuffer>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Attr<float>("scale"));

}  // namespace jaxlora
