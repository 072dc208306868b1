// silu(gate) * up (Shazeer 2020) and its gradient.

INLINE Vec sigmoid(Vec x) {
  const Vec one = fill(1.0f), size = max(x, sub(zero(), x)), small = exp2(mul(size, fill(-kLog2E)));
  return div(where_negative(x, small, one), add(one, small));
}

INLINE Vec silu_times(Vec gate, Vec up) {
  return mul(mul(gate, sigmoid(gate)), up);
}

void swiglu(const float* gates, const float* ups, int64_t stride, float* y, int64_t n, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float *gate = gates + row * stride, *up = ups + row * stride;
    float* out = y + row * n;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(out + i, silu_times(load(gate + i), load(up + i)));
    if (i < n) store_part(out + i, silu_times(load_part(gate + i, n - i), load_part(up + i, n - i)), n - i);
  }
}

INLINE void swiglu_slopes(Vec gate, Vec up, Vec slope, Vec (&to)[2]) {
  const Vec share = sigmoid(gate), silu = mul(gate, share);
  to[0] = mul(mul(slope, up), fma(silu, sub(fill(1.0f), share), share));
  to[1] = mul(slope, silu);
}

void swiglu_gradient(const float* gate, const float* up, const float* slope, float* d_gate, float* d_up, int64_t begin, int64_t end) {
  Vec to[2];
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) {
    swiglu_slopes(load(gate + i), load(up + i), load(slope + i), to);
    store(d_gate + i, to[0]);
    store(d_up + i, to[1]);
  }
  if (const int64_t rest = end - i; rest > 0) {
    swiglu_slopes(load_part(gate + i, rest), load_part(up + i, rest), load_part(slope + i, rest), to);
    store_part(d_gate + i, to[0], rest);
    store_part(d_up + i, to[1], rest);
  }
}
