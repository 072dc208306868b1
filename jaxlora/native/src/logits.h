// What greedy decoding needs of each row of logits [m, n]: the first largest one, and the logarithm of the sum of exponentials.

// The first of n values that equals one of them.
INLINE int64_t first_of(const float* x, int64_t n, float value) {
  int64_t at = 0;
  for (; at + kWidth <= n && !any_equal(load(x + at), fill(value)); at += kWidth) {
  }
  while (at < n - 1 && x[at] != value) ++at;
  return at;
}

void summarize(const float* logits, int32_t* argmax, float* logsumexp, int64_t n, int64_t begin, int64_t end) {
  constexpr float kLn2 = 0.693147181f;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = logits + row * n;
    const int64_t whole = n / kWidth * kWidth;
    Vec top = fill(-__builtin_inff());
    for (int64_t i = 0; i < whole; i += kWidth) top = max(top, load(x + i));
    float highest = largest(top);
    for (int64_t i = whole; i < n; ++i) highest = x[i] > highest ? x[i] : highest;

    argmax[row] = static_cast<int32_t>(first_of(x, n, highest));

    Vec total = zero(), shift = fill(-highest * kLog2E);
    for (int64_t i = 0; i < whole; i += kWidth) total = add(total, exp2(fma(load(x + i), fill(kLog2E), shift)));
    float rest = 0;
    for (int64_t i = whole; i < n; ++i) rest += __builtin_exp2f((x[i] - highest) * kLog2E);
    logsumexp[row] = highest + __builtin_log2f(sum(total) + rest) * kLn2;
  }
}
