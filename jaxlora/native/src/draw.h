// Draws from what top-k, then top-p, then min-p leave of softmax(x / temperature), for rows of logits [m, n]: the largest of x plus
// Gumbel noise, which is what `jax.random.gumbel` gives for the row's key and position. Each row is computed on its own.
//
// A row lies in whole vectors, with -inf behind its end. Its weights are exponentials of the distance to the largest value.

constexpr float kNothing = -__builtin_inff();

// Noise lies between -4.5 and 16: what is e^-20.5 times as likely as the first is never drawn, and gets none.
constexpr float kNeverDrawn = 1.2e-9f;

// The random bits of a counter (a, b) under a key: threefry2x32 of Salmon et al. 2011, with 20 rounds.
template <typename T>
INLINE T threefry(const uint32_t (&key)[2], T& a, T& b) {
  constexpr int kTurns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1bd11bdau};
  a += keys[0];
  b += keys[1];
#pragma GCC unroll 5
  for (uint32_t group = 0; group < 5; ++group) {
#pragma GCC unroll 4
    for (int turn = 0; turn < 4; ++turn) {
      const int bits = kTurns[group % 2][turn];
      a += b;
      b = ((b << bits) | (b >> (32 - bits))) ^ a;
    }
    a += keys[(group + 1) % 3];
    b += keys[(group + 2) % 3] + group + 1;
  }
  return a ^ b;
}

// The natural logarithm of positive normal numbers to about one unit in the last place, near 1 too (the polynomial of Cephes' logf).
INLINE Vec log(Vec x) {
  const Ints number = reinterpret_cast<Ints>(x);
  const Ints power = (number - 0x3f3504f3) >> 23;  // so that the rest lies between the roots of 1/2 and of 2
  const Vec exponent = to_floats(power), f = sub(reinterpret_cast<Vec>(number - (power << 23)), fill(1.0f)), square = mul(f, f);
  constexpr float kTerms[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                              -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  Vec p = fill(7.0376836292e-2f);
#pragma GCC unroll 8
  for (float term : kTerms) p = fma(p, f, fill(term));
  Vec low = fma(exponent, fill(-2.12194440e-4f), mul(mul(p, f), square));
  low = fma(square, fill(-0.5f), low);
  return fma(exponent, fill(0.693359375f), add(f, low));
}

// Noise of the tokens `counts`.
INLINE Vec gumbel(const uint32_t (&key)[2], Words counts) {
  Words high = counts ^ counts, low = counts;
  const Words bits = threefry(key, high, low);
  const Vec uniform = max(fill(__FLT_MIN__), sub(reinterpret_cast<Vec>(bits >> 9 | 0x3f800000u), fill(1.0f)));
  return sub(zero(), log(sub(zero(), log(uniform))));
}

// The largest of `values` that has `wanted` together with those above it, each counting worth(value), or the least of all. Equal ones
// count together. Moves the values about; a selection that halves what is left (Hoare 1961). Of our own, as the linker keeps one copy
// of a template of the standard library for all instruction sets.
template <typename Worth>
float select_from(float* values, int64_t count, double wanted, Worth worth) {
  if (count == 0) return kNothing;
  float *begin = values, *end = values + count;
  for (double above = 0;;) {
    const float first = *begin, middle = begin[(end - begin) / 2], last = end[-1];
    const float low = first < last ? first : last, high = first < last ? last : first;
    const float pivot = middle < low ? low : middle > high ? high : middle;
    float *larger = begin, *at = begin, *smaller = end;
    double of_larger = 0, of_equal = 0;
    while (at < smaller) {
      const float value = *at;
      if (value > pivot) {
        of_larger += worth(value);
        *at++ = *larger;
        *larger++ = value;
      } else if (value < pivot) {
        *at = *--smaller;
        *smaller = value;
      } else {
        of_equal += worth(value);
        ++at;
      }
    }
    if (larger > begin && above + of_larger >= wanted) {
      end = larger;
    } else if (smaller == end || above + of_larger + of_equal >= wanted) {
      return pivot;
    } else {
      above += of_larger + of_equal;
      begin = smaller;
    }
  }
}

// Copies those of the values that are at or above `least`; how many.
INLINE int64_t gather(const float* values, int64_t size, float least, float* to) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; i += kWidth) {
    const Vec value = load(values + i);
    if (!any_equal(max(value, fill(least)), value)) continue;
    for (int64_t lane = i; lane < i + kWidth; ++lane) {
      if (values[lane] >= least) to[count++] = values[lane];
    }
  }
  return count;
}

// The k-th largest of the values. Of the largest ones of groups of 16 k are no larger than it, which leaves few to look at.
INLINE float kth_largest(const float* values, int64_t size, int64_t k, float* room) {
  const auto one = [](float) { return 1.0; };
  const int64_t groups = (size / kWidth + 15) / 16 * kWidth;
  float least = kNothing;
  if (k <= groups) {
    for (int64_t i = 0; i < groups; i += kWidth) {
      Vec top = load(values + i);
      for (int64_t more = i + groups; more < size; more += groups) top = max(top, load(values + more));
      store(room + i, top);
    }
    least = select_from(room, groups, static_cast<double>(k), one);
  }
  return select_from(room, gather(values, size, least, room), static_cast<double>(k), one);
}

// x and its weights, whose sum it returns, for one row; values that are not among the k largest become -inf.
INLINE float weigh(const float* logits, int64_t n, int64_t size, float temperature, int64_t k, float* x, float* weights) {
  const Vec divisor = fill(temperature);
  const int64_t whole = n / kWidth * kWidth;
  Vec top = fill(kNothing);
  for (int64_t i = 0; i < whole; i += kWidth) {
    const Vec value = div(load(logits + i), divisor);
    store(x + i, value);
    top = max(top, value);
  }
  float highest = largest(top);
  for (int64_t i = whole; i < size; ++i) {
    x[i] = i < n ? logits[i] / temperature : kNothing;
    highest = x[i] > highest ? x[i] : highest;
  }
  const Vec least = fill(k > 0 && k < n ? kth_largest(x, size, k, weights) : kNothing);
  Vec total = zero();
  for (int64_t i = 0; i < size; i += kWidth) {
    const Vec value = where_negative(sub(load(x + i), least), fill(kNothing), load(x + i));
    const Vec weight = exp2(mul(sub(value, fill(highest)), fill(kLog2E)));  // 1 of the largest
    store(x + i, value);
    store(weights + i, weight);
    total = add(total, weight);
  }
  return sum(total);
}

// The token whose x with noise is largest, of those that weigh at least so much.
INLINE int64_t choose(const float* x, const float* weights, int64_t size, float least, const uint32_t (&key)[2], float* room) {
  Words counts;
  for (int lane = 0; lane < kWidth; ++lane) counts[lane] = static_cast<uint32_t>(lane);
  Vec top = fill(kNothing);
  for (int64_t i = 0; i < size; i += kWidth, counts += static_cast<uint32_t>(kWidth)) {
    const Vec weight = load(weights + i);
    Vec value = fill(kNothing);
    if (any_equal(max(weight, fill(least)), weight)) {
      value = where_negative(sub(weight, fill(least)), value, add(load(x + i), gumbel(key, counts)));
    }
    store(room + i, value);
    top = max(top, value);
  }
  return first_of(room, size, largest(top));
}

void draw(const Draw& d, float* space, int64_t begin, int64_t end) {
  const int64_t size = (d.n + kWidth - 1) / kWidth * kWidth;
  float *x = space, *weights = x + size, *room = weights + size;
  for (int64_t row = begin; row < end; ++row) {
    d.tokens[row] = 0;
    if (!(d.temperature[row] > 0)) continue;
    const float total = weigh(d.logits + row * d.n, d.n, size, d.temperature[row] > 1e-6f ? d.temperature[row] : 1e-6f, d.top_k[row], x, weights);
    float least = kNeverDrawn;
    if (const float p = d.top_p[row]; p < 1) {
      // All that weigh less than a share of the rest that is left out would not fill it.
      const int64_t count = gather(weights, size, 0.5f * (1 - p) * total / static_cast<float>(size), room);
      const float nucleus = select_from(room, count, static_cast<double>(p) * total, [](float weight) { return static_cast<double>(weight); });
      least = nucleus > least ? nucleus : least;
    }
    least = d.min_p[row] > least ? d.min_p[row] : least;
    uint32_t high = 0, low = static_cast<uint32_t>(d.positions[row]);
    threefry({d.keys[2 * row], d.keys[2 * row + 1]}, high, low);
    const int64_t token = choose(x, weights, size, least, {high, low}, room);
    d.tokens[row] = static_cast<int32_t>(token < d.n ? token : 0);
  }
}
