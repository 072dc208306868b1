// A product with frozen weights and one low-rank update for all rows, y = x @ w + (x @ a) @ b, and its gradient: what training needs.
// Ranks are filled up with zeros to whole vectors, so that they count as columns.

// Rows [begin, end) of y = x @ w for a plain w of few columns, [k, columns].
void project_rows(const float* x, const float* w, float* y, int64_t k, int64_t columns, int64_t begin, int64_t end) {
  product<false>(end - begin, x + begin * k, k, 1, w, columns, y + begin * columns, columns, k, columns);
}

// Columns [begin, end) of y [ranks, n] = h^T @ x for h [m, ranks] and x [m, n].
void project_columns(const float* h, const float* x, float* y, int64_t m, int64_t ranks, int64_t n, int64_t begin, int64_t end) {
  product<false>(ranks, h, 1, ranks, x + begin, n, y + begin, n, m, end - begin);
}
