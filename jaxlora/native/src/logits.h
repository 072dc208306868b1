// What is asked of rows of logits: the first largest one, the logarithm of the sum of exponentials, and its slopes.

INLINE float log_of(float x) {
  return __builtin_log2f(x) * 0.693147181f;
}

// The first of n values that equals one of them.
INLINE int64_t first_of(const float* x, int64_t n, float value) {
  int64_t at = 0;
  for (; at + kWidth <= n && !any_equal(load(x + at), fill(value)); at += kWidth) {
  }
  while (at < n - 1 && x[at] != value) ++at;
  return at;
}

INLINE float largest_of(const float* x, int64_t n) {
  const int64_t whole = n / kWidth * kWidth;
  Vec top = fill(-__builtin_inff());
  for (int64_t i = 0; i < whole; i += kWidth) top = max(top, load(x + i));
  float highest = largest(top);
  for (int64_t i = whole; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

// Of exp(factor (x - highest)).
INLINE float sum_of_exponentials(const float* x, int64_t n, float factor, float highest) {
  const int64_t whole = n / kWidth * kWidth;
  Vec total = zero(), top = fill(highest), scale = fill(factor * kLog2E);
  for (int64_t i = 0; i < whole; i += kWidth) total = add(total, exp2(mul(sub(load(x + i), top), scale)));
  float rest = 0;
  for (int64_t i = whole; i < n; ++i) rest += __builtin_exp2f((x[i] - highest) * factor * kLog2E);
  return sum(total) + rest;
}

void summarize(const float* logits, int32_t* argmax, float* logsumexp, int64_t n, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float *x = logits + row * n, highest = largest_of(x, n);
    argmax[row] = static_cast<int32_t>(first_of(x, n, highest));
    logsumexp[row] = highest + log_of(sum_of_exponentials(x, n, 1.0f, highest));
  }
}

float log_prob(SoftmaxRow* row, int64_t target) {
  row->highest = largest_of(row->logits, row->n);
  row->total = sum_of_exponentials(row->logits, row->n, row->factor, row->highest);
  return (row->logits[target] - row->highest) * row->factor - log_of(row->total);
}

void log_prob_slopes(const SoftmaxRow& row, int64_t target, float* to, int64_t begin, int64_t end) {
  const Vec top = fill(row.highest), scale = fill(row.factor * kLog2E), minus = fill(-row.factor / row.total);
  const auto slopes = [&](Vec x) __attribute__((always_inline)) { return mul(minus, exp2(mul(sub(x, top), scale))); };
  const int64_t count = end - begin;
  const float* x = row.logits + begin;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, slopes(load(x + i)));
  if (i < count) store_part(to + i, slopes(load_part(x + i, count - i)), count - i);
  if (target >= begin && target < end) to[target - begin] += row.factor;
}
