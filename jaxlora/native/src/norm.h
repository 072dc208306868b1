// The root-mean-square norm of each row of x [m, n], times scale [n]. XLA would add up in an order that depends on the number of rows.

// What a row is multiplied with.
INLINE float norm_factor(const float* x, float eps, int64_t n) {
  const int64_t whole = n / kWidth * kWidth;
  Vec squares = zero();
  for (int64_t i = 0; i < whole; i += kWidth) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (int64_t i = whole; i < n; ++i) total = __builtin_fmaf(x[i], x[i], total);
  return 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps);
}

INLINE void normalize(const float* x, const float* scale, float eps, float* y, int64_t n) {
  const int64_t whole = n / kWidth * kWidth;
  const float factor = norm_factor(x, eps, n);
  for (int64_t i = 0; i < whole; i += kWidth) store(y + i, mul(load(scale + i), mul(load(x + i), fill(factor))));
  for (int64_t i = whole; i < n; ++i) y[i] = scale[i] * (x[i] * factor);
}

void rms_norm(const float* x, const float* scale, float eps, float* y, int64_t n, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) normalize(x + row * n, scale, eps, y + row * n, n);
}

// dx = factor * (scale * slope - x * factor^2 * mean(scale * slope * x)), `slope` being of the result.
void rms_norm_gradient(const float* x, const float* scale, float eps, const float* slope, float* dx, int64_t n, int64_t begin, int64_t end) {
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t row = begin; row < end; ++row) {
    const float *of_x = x + row * n, *of_slope = slope + row * n;
    float* to = dx + row * n;
    Vec along = zero();
    for (int64_t i = 0; i < whole; i += kWidth) along = fma(mul(load(scale + i), load(of_slope + i)), load(of_x + i), along);
    float total = sum(along);
    for (int64_t i = whole; i < n; ++i) total = __builtin_fmaf(scale[i] * of_slope[i], of_x[i], total);
    const float factor = norm_factor(of_x, eps, n), back = -factor * factor * total / static_cast<float>(n);
    for (int64_t i = 0; i < whole; i += kWidth) {
      store(to + i, mul(fill(factor), fma(load(of_x + i), fill(back), mul(load(scale + i), load(of_slope + i)))));
    }
    for (int64_t i = whole; i < n; ++i) to[i] = factor * __builtin_fmaf(of_x[i], back, scale[i] * of_slope[i]);
  }
}
