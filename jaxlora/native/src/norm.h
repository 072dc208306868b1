// The root-mean-square norm of each row of x [m, n], times scale [n]. XLA would add up in an order that depends on the number of rows.

void rms_norm(const float* x, const float* scale, float eps, float* y, int64_t n, int64_t begin, int64_t end) {
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t row = begin; row < end; ++row) {
    const float* in = x + row * n;
    float* out = y + row * n;
    Vec squares = zero();
    for (int64_t i = 0; i < whole; i += kWidth) squares = fma(load(in + i), load(in + i), squares);
    float total = sum(squares);
    for (int64_t i = whole; i < n; ++i) total = __builtin_fmaf(in[i], in[i], total);
    const float factor = 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps);
    for (int64_t i = 0; i < whole; i += kWidth) store(out + i, mul(load(scale + i), mul(load(in + i), fill(factor))));
    for (int64_t i = whole; i < n; ++i) out[i] = scale[i] * (in[i] * factor);
  }
}
