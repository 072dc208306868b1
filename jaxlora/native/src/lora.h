// Low-rank updates, one adapter at a time: its A and B are read once for all of its rows, and only as many ranks as it has.
// Sums over k run in lanes that are added at the end, sums over ranks in ascending order, the same for every row.
//
// Adapters lie far apart in the bank and each is read in short stretches, so that the hardware's prefetching starts over all the
// time. The first rows that pass over an item's weights therefore fetch those of the next one, a line for a line.

// Weights of type W widened in registers; x and what lies between A and B are float32.
template <typename W>
struct WideLora {
  using Weight = W;
  using X = float;
  static constexpr int kDepth = kWidth;    // values of k that `dot` takes
  static constexpr int kColumns = kWidth;  // columns that `add_ranks` takes
  static constexpr int kRanks = 8;         // ranks of B that it takes, at most
  static INLINE Vec dot(Vec acc, const X* x, const W* w) { return fma(load(x), load_value(w), acc); }
  static INLINE Vec dot(Vec acc, const X* x, const W* w, int64_t count) {
    return fma(load_part(x, count), load_part(w, count), acc);
  }
  static INLINE X narrow(float value) { return value; }

  // y[row][0 : count] += the sum over R ranks of hidden[row][r] * b[r * n + 0 : count]; count is kColumns, or less if not kWhole.
  template <int M, int R, bool kWhole>
  static INLINE void add_ranks(const X* const* hidden, const W* b, int64_t n, float* const* y, int64_t count) {
    Vec weight[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weight[r] = kWhole ? load_value(b + r * n) : load_part(b + r * n, count);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      Vec acc = kWhole ? load(y[m]) : load_part(y[m], count);
      for (int r = 0; r < R; ++r) acc = fma(fill(hidden[m][r]), weight[r], acc);
      if (kWhole) {
        store(y[m], acc);
      } else {
        alignas(64) float lanes[kWidth];
        store(lanes, acc);
        __builtin_memcpy(y[m], lanes, static_cast<size_t>(count) * sizeof(float));
      }
    }
  }
};

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

// Dot products of pairs of bfloat16: two values of k, or the same column of two ranks. x and what lies between A and B are rounded.
struct PairsLora {
  using Weight = uint16_t;
  using X = uint16_t;
  static constexpr int kDepth = 2 * kWidth;
  static constexpr int kColumns = 2 * kWidth;
  static constexpr int kRanks = 16;
  static INLINE Vec dot_pairs(Vec acc, __m512i x, __m512i w) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
  static INLINE Vec dot(Vec acc, const X* x, const Weight* w) {
    return dot_pairs(acc, _mm512_loadu_si512(x), _mm512_loadu_si512(w));
  }
  static INLINE Vec dot(Vec acc, const X* x, const Weight* w, int64_t count) {
    const __mmask32 mask = (1u << count) - 1;
    return dot_pairs(acc, _mm512_maskz_loadu_epi16(mask, x), _mm512_maskz_loadu_epi16(mask, w));
  }
  static INLINE X narrow(float value) { return to_bf16(value); }

  template <int M, int R, bool kWhole>
  static INLINE void add_ranks(const X* const* hidden, const Weight* b, int64_t n, float* const* y, int64_t count) {
    const __mmask32 mask = kWhole ? ~0u : (1u << count) - 1;
    const auto low_mask = static_cast<__mmask16>(mask), high_mask = static_cast<__mmask16>(mask >> 16);
    // Instructions that interleave work on eight columns at a time: `low` gets columns 0 to 3 of each, `high` 4 to 7.
    constexpr int kPairs = (R + 1) / 2;
    __m512i low[kPairs], high[kPairs];
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p) {
      const __m512i one = _mm512_maskz_loadu_epi16(mask, b + 2 * p * n);
      const __m512i other = R % 2 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, b + (2 * p + 1) * n);
      low[p] = _mm512_unpacklo_epi16(one, other);
      high[p] = _mm512_unpackhi_epi16(one, other);
    }
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      Vec lows = zero(), highs = zero();
#pragma GCC unroll 8
      for (int p = 0; p < kPairs; ++p) {
        uint32_t pair = hidden[m][2 * p];
        if (R % 2 == 0) __builtin_memcpy(&pair, hidden[m] + 2 * p, sizeof pair);
        const __m512i both = _mm512_set1_epi32(static_cast<int>(pair));
        lows = dot_pairs(lows, both, low[p]);
        highs = dot_pairs(highs, both, high[p]);
      }
      const Vec left = _mm512_permutex2var_ps(lows, first, highs), right = _mm512_permutex2var_ps(lows, second, highs);
      _mm512_mask_storeu_ps(y[m], low_mask, add(_mm512_maskz_loadu_ps(low_mask, y[m]), left));
      _mm512_mask_storeu_ps(y[m] + kWidth, high_mask, add(_mm512_maskz_loadu_ps(high_mask, y[m] + kWidth), right));
    }
  }
};

using Bf16Lora = PairsLora;
#else
using Bf16Lora = WideLora<uint16_t>;
#endif

// Weights of one item that are read while those of the one before it are used; null where they have been fetched.
template <typename T>
struct Ahead {
  const T* weights;
  int64_t stride;  // from rank to rank
};

// hidden[row][i] = x[row] . a[i] for M rows and R ranks, of which all sums fit a vector.
template <typename Math, int M, int R>
INLINE void dot_ranks(const typename Math::X* const* x, const typename Math::Weight* a, typename Math::X* const* hidden,
                      int64_t rank, int64_t k, const Ahead<typename Math::Weight>& ahead) {
  static_assert(M * R <= kWidth);
  Vec acc[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) acc[i] = zero();
  a += rank * k;
  int64_t c = 0;
  for (; c + Math::kDepth <= k; c += Math::kDepth) {
    if (ahead.weights) fetch(ahead.weights + rank * ahead.stride + c * R, Math::kDepth * R);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) acc[m * R + i] = Math::dot(acc[m * R + i], x[m] + c, a + i * k + c);
  }
  if (c < k) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) acc[m * R + i] = Math::dot(acc[m * R + i], x[m] + c, a + i * k + c, k - c);
  }
  alignas(64) float found[kWidth];
  store(found, sums(acc));
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < R; ++i) hidden[m][rank + i] = Math::narrow(found[m * R + i]);
}

// y[row][0 : columns] += sum over R ranks of hidden[row][r] * b[r, 0 : columns]. A block of y stays in the cache while ranks pass
// over it, and every rank is read as one stream.
template <typename Math, int M, int R>
INLINE void add_ranks(const typename Math::X* const* hidden, const typename Math::Weight* b, float* const* y, int64_t rank,
                      int64_t columns, int64_t n, const Ahead<typename Math::Weight>& ahead) {
  constexpr int64_t kLine = 64 / sizeof(typename Math::Weight);
  const typename Math::X* of_row[M];
  float* to[M];
  for (int m = 0; m < M; ++m) of_row[m] = hidden[m] + rank, to[m] = y[m];
  b += rank * n;
  int64_t c = 0;
  for (; c + Math::kColumns <= columns; c += Math::kColumns) {
    if (ahead.weights && c % kLine == 0) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) fetch(ahead.weights + (rank + r) * ahead.stride + c, 1);
    }
    Math::template add_ranks<M, R, true>(of_row, b + c, n, to, Math::kColumns);
    for (int m = 0; m < M; ++m) to[m] += Math::kColumns;
  }
  if (c < columns) Math::template add_ranks<M, R, false>(of_row, b + c, n, to, columns - c);
}

// The ranks of A, or the columns of B, that an item reads.
template <typename T>
struct LoraPart {
  LoraPart(const Lora& l, const LoraItem& item, bool down)
      : group(l.groups[item.group]),
        module(l.modules[item.module]),
        weights(static_cast<const T*>(l.bank) + group.slot * l.size +
                (down ? module.a + item.first * l.k : module.b + item.first)),
        count((down ? group.rank : module.n) - item.first),
        stride(down ? l.k : module.n) {
    const int64_t most = down ? kRankBlock : kColumnBlock;
    if (count > most) count = most;
  }
  const LoraGroup& group;
  const LoraModule& module;
  const T* weights;
  int64_t count, stride;
};

// Where the scales of a module lie in a bank of int8.
INLINE const int8_t* scales_of(const Lora& l, const LoraPart<int8_t>& part) {
  return static_cast<const int8_t*>(l.bank) + part.group.slot * l.size + part.module.b + l.ranks * part.module.n;
}

// hidden[r] *= scales[r], which need not be aligned.
INLINE void scale_ranks(float* hidden, const int8_t* scales, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    float scale;
    __builtin_memcpy(&scale, scales + r * kScaleBytes, sizeof scale);
    hidden[r] *= scale;
  }
}

// [begin, end) in blocks of N, then of the smaller ones, and then of one: body(the size of the block, its first).
template <int N, int... Smaller, typename Body>
INLINE void in_blocks(int64_t begin, int64_t end, Body body) {
  for (; begin + N <= end; begin += N) body(std::integral_constant<int, N>(), begin);
  if constexpr (sizeof...(Smaller) > 0) {
    in_blocks<Smaller...>(begin, end, body);
  } else {
    for (; begin < end; ++begin) body(std::integral_constant<int, 1>(), begin);
  }
}

// What lies between A and B of a module, [ranks], for one row.
template <typename X>
INLINE X* hidden_of(const Lora& l, const LoraItem& item, int64_t row) {
  return static_cast<X*>(l.hidden) + (item.module * l.m + l.rows[row]) * l.ranks;
}

// Four rows at a time, then one: pass(rows, item, its part, the first row, what to fetch meanwhile).
template <typename T, typename Pass>
INLINE void each_item(const Lora& l, const LoraItem* items, int64_t count, bool down, int64_t begin, int64_t end, Pass pass) {
  for (int64_t i = begin; i < end; ++i) {
    const LoraPart<T> part(l, items[i], down);
    Ahead<T> ahead{nullptr, 0};
    if (i + 1 < count) {
      const LoraPart<T> next(l, items[i + 1], down);
      ahead = {next.weights, next.stride};
    }
    in_blocks<4>(part.group.begin, part.group.end, [&](auto rows, int64_t row) {
      pass(rows, items[i], part, row, ahead);
      ahead.weights = nullptr;
    });
  }
}

template <typename Math>
void lora_down(const Lora& l, int64_t begin, int64_t end) {
  using T = typename Math::Weight;
  using X = typename Math::X;
  each_item<T>(l, l.down, l.down_count, true, begin, end,
               [&](auto rows, const LoraItem& item, const LoraPart<T>& part, int64_t row, const Ahead<T>& ahead) {
                 constexpr int M = rows, R = M == 1 ? 8 : kWidth / M;
                 const X* x[M];
                 X* hidden[M];
                 for (int m = 0; m < M; ++m) {
                   x[m] = static_cast<const X*>(l.x) + l.rows[row + m] * l.x_stride;
                   hidden[m] = hidden_of<X>(l, item, row + m) + item.first;
                 }
                 in_blocks<R>(0, part.count, [&](auto ranks, int64_t rank) {
                   dot_ranks<Math, M, decltype(ranks)::value>(x, part.weights, hidden, rank, l.k, ahead);
                 });
                 if constexpr (std::is_same_v<T, int8_t>) {
                   for (int m = 0; m < M; ++m) scale_ranks(hidden[m], scales_of(l, part) + item.first * kScaleBytes, part.count);
                 }
               });
}

template <typename Math>
void lora_up(const Lora& l, int64_t begin, int64_t end) {
  using T = typename Math::Weight;
  using X = typename Math::X;
  each_item<T>(l, l.up, l.up_count, false, begin, end,
               [&](auto rows, const LoraItem& item, const LoraPart<T>& part, int64_t row, const Ahead<T>& ahead) {
                 constexpr int M = rows;
                 const X* hidden[M];
                 float* y[M];
                 for (int m = 0; m < M; ++m) {
                   hidden[m] = hidden_of<X>(l, item, row + m);
                   y[m] = l.y + l.rows[row + m] * l.n + part.module.column + item.first;
                 }
                 in_blocks<Math::kRanks, 8>(0, part.group.rank, [&](auto ranks, int64_t rank) {
                   add_ranks<Math, M, decltype(ranks)::value>(hidden, part.weights, y, rank, part.count, part.stride, ahead);
                 });
               });
}
