// Products with frozen weights and the adapter that is being trained, and their gradient: handlers that XLA calls.
#include <cstring>

#include "product.h"

namespace jaxlora {
namespace {

using Shape = ffi::Span<const int64_t>;

bool trains_with(const ffi::AnyBuffer& w) {
  return w.element_type() == ffi::F32 || w.element_type() == ffi::U32;
}

// Ranks filled up with zeros to whole vectors, so that they count as columns.
int64_t padded(int64_t ranks) {
  return filled_up(ranks, 16);
}

// Whether an adapter is a [ranks, k] and b [n, ranks], as they lie in a file, and h [m, padded ranks].
bool fits(Shape a, Shape b, Shape h, int64_t m, int64_t k, int64_t n) {
  return a.size() == 2 && b.size() == 2 && h.size() == 2 && a[1] == k && b[0] == n && b[1] == a[0] && h[0] == m && h[1] == padded(a[0]) &&
         k % 16 == 0 && n % 16 == 0;
}

// to [columns, filled] = factor * from^T for from [ranks, columns] of which a value lies `step` from the next one of its rank.
void transpose(const float* from, int64_t of_rank, int64_t step, int64_t columns, int64_t ranks, int64_t filled, float factor, float* to) {
  for (int64_t i = 0; i < columns; ++i, from += step, to += filled) {
    for (int64_t rank = 0; rank < ranks; ++rank) to[rank] = factor * from[rank * of_rank];
    for (int64_t rank = ranks; rank < filled; ++rank) to[rank] = 0;
  }
}

// to [panels][filled][panel] = factor * from for such a from.
void pack(const float* from, int64_t of_rank, int64_t step, int64_t columns, int64_t ranks, int64_t filled, float factor, float* to) {
  const int64_t panel = active->panel;
  for (int64_t first = 0; first < columns; first += panel) {
    const int64_t of_panel = columns - first < panel ? columns - first : panel;
    for (int64_t rank = 0; rank < filled; ++rank, to += panel) {
      const int64_t count = rank < ranks ? of_panel : 0;
      const float* of = from + rank * of_rank + first * step;
      for (int64_t i = 0; i < count; ++i) to[i] = factor * of[i * step];
      for (int64_t i = count; i < panel; ++i) to[i] = 0;
    }
  }
}

constexpr int64_t kRows = 56;  // that are computed at a time

// body(begin, end) for rows [0, m), in blocks of kRows.
template <typename Body>
void each_block(int64_t m, const Body& body) {
  Pool::instance().split((m + kRows - 1) / kRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * kRows, (i + 1) * kRows < m ? (i + 1) * kRows : m);
  });
}

// Of a block of rows, for a thread to work in.
float* block_of(int64_t columns) {
  thread_local Scratch rows;
  return static_cast<float*>(rows.reserve(static_cast<size_t>(kRows * columns) * sizeof(float)));
}

// y [m, columns] = x @ w, of what dropout leaves of x where it isn't null.
void project_rows(const float* x, const Dropout* dropout, const float* w, float* y, int64_t m, int64_t k, int64_t columns) {
  each_block(m, [&](int64_t begin, int64_t end) {
    if (!dropout) return active->project_rows(x, w, y, k, columns, begin, end);
    float* const left = block_of(k);
    active->drop(*dropout, x + begin * k, left, false, begin * k, end * k);
    active->project_rows(left, w, y + begin * columns, k, columns, 0, end - begin);
  });
}

// dx [m, k] += what dropout leaves of dh [m, filled] @ a [filled, k].
void add_dropped(const float* dh, const float* a, const Dropout& dropout, float* dx, int64_t m, int64_t filled, int64_t k) {
  each_block(m, [&](int64_t begin, int64_t end) {
    float* const whole = block_of(k);
    active->project_rows(dh + begin * filled, a, whole, filled, k, 0, end - begin);
    active->drop(dropout, whole, dx + begin * k, true, begin * k, end * k);
  });
}

using U32 = ffi::Buffer<ffi::U32>;

// Whether there is dropout: without a seed there is none.
bool read(U32 seed, U32 number, int64_t limit, float factor, Dropout* dropout) {
  if (seed.element_count() != 2 || number.element_count() != 1) return false;
  const uint32_t own = number.typed_data()[0];
  *dropout = {mixed(seed.typed_data()[0] ^ own), mixed(seed.typed_data()[1] + own), static_cast<uint32_t>(limit), factor};
  return true;
}

float* reserve(int64_t values) {
  return static_cast<float*>(scratch.reserve(static_cast<size_t>(values) * sizeof(float)));
}

// y = x @ w + scale * h @ b^T with h = x @ a^T, which has zeros behind its ranks, of what dropout leaves of x.
ffi::Error adapted(F32 x, ffi::AnyBuffer w, F32 a, F32 b, U32 seed, U32 number, F32Result y, F32Result h, float scale, int64_t limit,
                   float factor) {
  const auto xs = x.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ys.size() != 2 || xs[0] != ys[0] || !trains_with(w)) return bad("adapted takes x [m, k], packed w and y [m, n]");
  const int64_t m = xs[0], k = xs[1], n = ys[1];
  if (!fits(a.dimensions(), b.dimensions(), h->dimensions(), m, k, n)) return bad("the adapter has another shape");
  const int64_t ranks = a.dimensions()[0], filled = padded(ranks);
  float* const down = reserve((k + panels(n) * active->panel) * filled);
  float* const up = down + k * filled;
  transpose(a.typed_data(), k, 1, k, ranks, filled, 1, down);
  pack(b.typed_data(), 1, ranks, n, ranks, filled, scale, up);
  Dropout dropout;
  project_rows(x.typed_data(), read(seed, number, limit, factor, &dropout) ? &dropout : nullptr, down, h->typed_data(), m, k, filled);
  const Rows rows = prepare({x.typed_data(), m, k}, form_for(w));
  return multiply(rows, w, y->typed_data(), m, k, n, false, {h->typed_data(), up, filled});
}

// Of `slope` [m, n] with respect to y: dx = slope @ w^T + dh @ a with dh = scale * slope @ b, da = dh^T @ x and db = scale * slope^T @ h, of what
// dropout leaves of dh @ a and of x; w is packed transposed, of [n, k].
ffi::Error adapted_gradient(F32 x, F32 h, ffi::AnyBuffer w, F32 a, F32 b, F32 slope, U32 seed, U32 number, F32Result dx, F32Result da,
                            F32Result db, float scale, int64_t limit, float factor) {
  const auto ss = slope.dimensions(), xs = x.dimensions();
  if (ss.size() != 2 || xs.size() != 2 || ss[0] != xs[0] || !trains_with(w)) return bad("adapted_gradient takes x [m, k] and slope [m, n]");
  const int64_t m = xs[0], k = xs[1], n = ss[1];
  if (!fits(a.dimensions(), b.dimensions(), h.dimensions(), m, k, n)) return bad("the adapter has another shape");
  const int64_t ranks = a.dimensions()[0], filled = padded(ranks);
  float* const dh = reserve((m + 2 * n + panels(k) * active->panel) * filled);
  float *const down = dh + m * filled, *const db_transposed = down + n * filled, *const up = db_transposed + n * filled;
  transpose(b.typed_data(), 1, ranks, n, ranks, filled, scale, down);
  Dropout dropout;
  const bool drops = read(seed, number, limit, factor, &dropout);
  if (drops) {
    std::memcpy(up, a.typed_data(), static_cast<size_t>(ranks * k) * sizeof(float));
    std::memset(up + ranks * k, 0, static_cast<size_t>((filled - ranks) * k) * sizeof(float));
  } else {
    pack(a.typed_data(), k, 1, k, ranks, filled, 1, up);
  }
  project_rows(slope.typed_data(), nullptr, down, dh, m, n, filled);
  const Rows rows = prepare({slope.typed_data(), m, n}, form_for(w));
  const Update update = drops ? Update{} : Update{dh, up, filled};
  if (auto error = multiply(rows, w, dx->typed_data(), m, n, k, false, update); error.failure()) return error;
  if (drops) add_dropped(dh, up, dropout, dx->typed_data(), m, filled, k);
  auto blocks = [](int64_t columns) { return (columns + kProjectedColumns - 1) / kProjectedColumns; };
  const int64_t of_a = blocks(k);
  Pool::instance().split(of_a + blocks(n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i < of_a) {
        active->project_columns(dh, filled, x.typed_data(), drops ? &dropout : nullptr, da->typed_data(), m, ranks, k, i);
        continue;
      }
      active->project_columns(h.typed_data(), filled, slope.typed_data(), nullptr, db_transposed, m, ranks, n, i - of_a);
      const int64_t first = (i - of_a) * kProjectedColumns, columns = n - first < kProjectedColumns ? n - first : kProjectedColumns;
      transpose(db_transposed + first, n, 1, columns, ranks, ranks, scale, db->typed_data() + first * ranks);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_adapted, adapted,
                              Ffi::Bind()
                                  .Arg<F32>()             // x
                                  .Arg<ffi::AnyBuffer>()  // w
                                  .Arg<F32>()             // a
                                  .Arg<F32>()             // b
                                  .Arg<U32>()             // seed
                                  .Arg<U32>()             // number
                                  .Ret<F32>()             // y
                                  .Ret<F32>()             // h
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("limit")
                                  .Attr<float>("factor"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_adapted_gradient, adapted_gradient,
                              Ffi::Bind()
                                  .Arg<F32>()             // x
                                  .Arg<F32>()             // h
                                  .Arg<ffi::AnyBuffer>()  // w
                                  .Arg<F32>()             // a
                                  .Arg<F32>()             // b
                                  .Arg<F32>()             // slope
                                  .Arg<U32>()             // seed
                                  .Arg<U32>()             // number
                                  .Ret<F32>()             // dx
                                  .Ret<F32>()             // da
                                  .Ret<F32>()             // db
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("limit")
                                  .Attr<float>("factor"));

}  // namespace jaxlora
