// silu(gate) * up for rows of gate and up side by side, x [m, 2 n] -> y [m, n] (Shazeer 2020).

INLINE Vec silu_times(Vec gate, Vec up) {
  const Vec one = fill(1.0f), size = max(gate, sub(zero(), gate)), small = exp2(mul(size, fill(-kLog2E)));
  const Vec sigmoid = div(where_negative(gate, small, one), add(one, small));
  return mul(mul(gate, sigmoid), up);
}

void swiglu(const float* x, float* y, int64_t n, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float *gate = x + row * 2 * n, *up = gate + n;
    float* out = y + row * n;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(out + i, silu_times(load(gate + i), load(up + i)));
    if (i < n) store_part(out + i, silu_times(load_part(gate + i, n - i), load_part(up + i, n - i)), n - i);
  }
}
