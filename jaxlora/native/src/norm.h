// The root-mean-square norm of each row of x [m, n], times scale [n]. XLA would add up in an order that depends on the number of rows.

INLINE void normalize(const float* x, const float* scale, float eps, float* y, int64_t n) {
  const int64_t whole = n / kWidth * kWidth;
  Vec squares = zero();
  for (int64_t i = 0; i < whole; i += kWidth) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (int64_t i = whole; i < n; ++i) total = __builtin_fmaf(x[i], x[i], total);
  const float factor = 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < whole; i += kWidth) store(y + i, mul(load(scale + i), mul(load(x + i), fill(factor))));
  for (int64_t i = whole; i < n; ++i) y[i] = scale[i] * (x[i] * factor);
}

void rms_norm(const float* x, const float* scale, float eps, float* y, int64_t n, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) normalize(x + row * n, scale, eps, y + row * n, n);
}
