// A product with frozen weights and one low-rank update for all rows, y = x @ w + (x @ a) @ b, and its gradient: what training needs.

// What dropout leaves of values that begin at an index.
INLINE Vec dropped(const Dropout& d, Vec x, uint32_t index) {
  Words lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<uint32_t>(i);
  const Words stays = reinterpret_cast<Words>(mixed(mixed(lanes + (index + d.first)) ^ d.second) < d.limit);
  return reinterpret_cast<Vec>(reinterpret_cast<Words>(mul(x, fill(d.factor))) & stays);
}

void drop(const Dropout& d, const float* x, float* to, bool onto, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < end - begin; i += kWidth) {
    const Vec left = dropped(d, load(x + i), static_cast<uint32_t>(begin + i));
    store(to + i, onto ? add(load(to + i), left) : left);
  }
}

// Rows [begin, end) of y = x @ w for a plain w of few columns, [k, columns].
void project_rows(const float* x, const float* w, float* y, int64_t k, int64_t columns, int64_t begin, int64_t end) {
  product<false>(end - begin, x + begin * k, k, 1, w, columns, y + begin * columns, columns, k, columns);
}

// A block of columns of y [ranks, n] = h^T @ x for h [m, h_stride], of which `ranks` columns count, and x [m, n]. Rows of x lie far
// apart, often in the same sets of a cache, and are read for every tile of ranks: some at a time are copied together.
void project_columns(const float* h, int64_t h_stride, const float* x, const Dropout* dropout, float* y, int64_t m, int64_t ranks, int64_t n,
                     int64_t block) {
  constexpr int64_t kRows = 64;
  alignas(64) float part[kRows * kProjectedColumns];
  const int64_t first = block * kProjectedColumns, columns = smaller(n - first, kProjectedColumns);
  int64_t row = 0;
  do {  // once without any rows, too: then y is zero
    const int64_t rows = smaller(m - row, kRows);
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = x + (row + i) * n + first;
      fetch(from + kRows * n, columns);
      for (int64_t c = 0; c < columns; c += kWidth) {
        const Vec values = load(from + c);
        store(part + i * kProjectedColumns + c, dropout ? dropped(*dropout, values, static_cast<uint32_t>(from + c - x)) : values);
      }
    }
    (row ? product<true> : product<false>)(ranks, h + row * h_stride, 1, h_stride, part, kProjectedColumns, y + first, n, rows, columns);
  } while ((row += kRows) < m);
}
