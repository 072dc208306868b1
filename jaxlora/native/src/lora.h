// Low-rank updates, one adapter at a time: its A and B are read once for all of its rows, and only as many ranks as it has.
//
// A [k, ranks] and B [ranks, columns] lie in panels of kLoraPanel columns, the last one of 8 or 16: [panels][k][panel], in bfloat16
// [panels][pairs of k][panel][2]. Each is read as one stream. A sum runs over k in ascending order, in parts that are added at the end, the
// same for every row.

#ifdef __AVX512F__

// Eight columns, the other lanes are zero.
INLINE Vec load_half(const float* p) {
  return _mm512_maskz_loadu_ps(0xff, p);
}
INLINE Vec load_half(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
INLINE __m512i load_half(const uint32_t* p) {
  return _mm512_maskz_loadu_epi16(0xffff, p);
}

#endif

template <int kColumns>
constexpr int kVectors = kColumns > kWidth ? kColumns / kWidth : 1;

// Values of k that lie side by side.
template <typename Weight>
constexpr int kDepthOf = std::is_same_v<Weight, uint32_t> ? 2 : 1;

// Columns of a line in float32, as many as a vector holds, for each value of k.
template <int kColumns, typename T>
INLINE void load_columns(const T* p, Vec (&weights)[1]) {
#ifdef __AVX512F__
  if constexpr (kColumns < kWidth) {
    weights[0] = load_half(p);
    return;
  }
#endif
  weights[0] = load_value(p);
}
template <int kColumns>
INLINE void load_columns(const uint32_t* p, Vec (&weights)[2]) {
#ifdef __AVX512F__
  if constexpr (kColumns < kWidth) {
    weights[0] = even_of(load_half(p)), weights[1] = odd_of(load_half(p));
    return;
  }
#endif
  weights[0] = even_bf16(p), weights[1] = odd_bf16(p);
}

// Products of M rows with a panel along k: the even steps are added up in one place, the odd ones in another, as with few rows each addition would
// wait for the one before.
template <typename Math>
struct Stepwise {
  // acc[row] += x[row] . w, where x has `steps` times Math::kDepth values. Meanwhile as much is fetched from `ahead` on as is read.
  template <int kColumns, int M, typename X, typename Weight>
  static INLINE void multiply(const X* const (&x)[M], const Weight* w, int64_t steps, const Weight* ahead,
                              Vec (&acc)[M][kVectors<kColumns>]) {
    constexpr int V = kVectors<kColumns>;
    Vec odd[M][V];
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) odd[m][v] = zero();
    const auto step = [&](int64_t i, Vec (&sums)[M][V]) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead + i * kColumns), _MM_HINT_T1);
      Math::template step<kColumns>(x, i, w + i * kColumns, sums);
    };
    int64_t i = 0;
    for (; i + 2 <= steps; i += 2) step(i, acc), step(i + 1, odd);
    if (i < steps) step(i, acc);
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) acc[m][v] = add(acc[m][v], odd[m][v]);
  }
};

// Weights of type W widened in registers; x and what lies between A and B are float32.
template <typename W>
struct WideLora : Stepwise<WideLora<W>> {
  using Weight = W;
  using X = float;
  static constexpr int kDepth = kDepthOf<W>;
  static INLINE void narrow(Vec values, X* to) { store(to, values); }
  template <int kColumns, int M>
  static INLINE void step(const X* const (&x)[M], int64_t i, const W* w, Vec (&acc)[M][kVectors<kColumns>]) {
    for (int v = 0; v < kVectors<kColumns>; ++v) {
      Vec weights[kDepth];
      load_columns<kColumns>(w + v * kWidth, weights);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        for (int j = 0; j < kDepth; ++j) acc[m][v] = fma(fill(x[m][kDepth * i + j]), weights[j], acc[m][v]);
    }
  }
};

#ifdef __AVX512BF16__

// Pairs of bfloat16 on both sides: x and what lies between A and B are rounded.
struct RoundedLora {
  using Weight = uint32_t;
  using X = uint16_t;
  static constexpr int kDepth = kDepthOf<Weight>;
  static INLINE void narrow(Vec values, X* to) { store_rounded(values, to); }
};

// Their dot products.
struct DotPairsLora : RoundedLora, Stepwise<DotPairsLora> {
  template <int kColumns, int M>
  static INLINE void step(const X* const (&x)[M], int64_t i, const Weight* w, Vec (&acc)[M][1]) {
    const auto weights = reinterpret_cast<__m512bh>(kColumns < kWidth ? load_half(w) : _mm512_loadu_si512(w));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      acc[m][0] = _mm512_dpbf16_ps(acc[m][0], weights, reinterpret_cast<__m512bh>(_mm512_set1_epi32(read_int(x[m] + 2 * i))));
    }
  }
};

#endif

// The A or B that an item reads.
template <typename T>
INLINE const T* weights_of(const Lora& l, const LoraItem& item, bool down) {
  constexpr int64_t kValueBytes = sizeof(T) / kDepthOf<T>;
  const LoraGroup& group = l.groups[item.group];
  const LoraModule& module = l.modules[item.module];
  const int64_t value = group.slot * l.size + group.rank * (l.start + (down ? module.a : module.b));
  return reinterpret_cast<const T*>(static_cast<const char*>(l.bank) + value * kValueBytes);
}

// Where in it an item begins.
template <typename T>
INLINE int64_t first_of(const Lora& l, const LoraItem& item, bool down) {
  const int64_t rank = l.groups[item.group].rank;
  return item.first * (down ? smaller(rank, kLoraPanel) : rank) / kDepthOf<T>;
}

// Where the scales of ranks lie in a bank of int8.
INLINE const float* scales_of(const Lora& l, const LoraItem& item) {
  const LoraGroup& group = l.groups[item.group];
  return reinterpret_cast<const float*>(weights_of<int8_t>(l, item, false) + group.rank * filled_up(l.modules[item.module].n, kLoraUnit));
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

// body(the columns of a panel of which so many are left).
template <typename Body>
INLINE void with_columns(int64_t left, Body body) {
  left > kLoraUnit ? body(std::integral_constant<int, kLoraPanel>()) : body(std::integral_constant<int, kLoraUnit>());
}

// The sums over a part of k between A and B of a module for one row, [hidden_stride].
INLINE float* hidden_of(const Lora& l, int64_t module, int64_t part, int64_t row) {
  return l.hidden + ((module * l.parts + part) * l.m + row) * l.hidden_stride;
}

// Those sums of an item for M of its group's rows, from entry `at` of Lora::rows on. What is fetched meanwhile begins at `ahead`.
template <typename Math, int M>
INLINE void down_rows(const Lora& l, const LoraItem& item, int64_t at, const typename Math::Weight* a, const typename Math::Weight* ahead) {
  const typename Math::X* x[M];
  float* hidden[M];
  for (int m = 0; m < M; ++m) {
    x[m] = static_cast<const typename Math::X*>(l.x) + l.rows[at + m] * l.x_stride + item.first;
    hidden[m] = hidden_of(l, item.module, item.first / l.part, l.rows[at + m]);
  }
  const int64_t rank = l.groups[item.group].rank, count = smaller(l.k - item.first, l.part);
  for (int64_t r = 0; r < rank; r += kLoraPanel) {
    with_columns(rank - r, [&](auto columns) {
      constexpr int kColumns = columns;
      const int64_t from = (r * l.k + item.first * kColumns) / Math::kDepth;
      Vec acc[M][kVectors<kColumns>];
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < kVectors<kColumns>; ++v) acc[m][v] = zero();
      Math::template multiply<kColumns>(x, a + from, count / Math::kDepth, ahead + r * l.k / Math::kDepth, acc);
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < kVectors<kColumns>; ++v) store(hidden[m] + r + v * kWidth, acc[m][v]);
    });
  }
}

// What lies between A and B for one row, [hidden_stride], from the sums over parts of k; it holds anything behind the ranks.
template <typename Math>
INLINE void join_parts(const Lora& l, const LoraItem& item, int64_t row, typename Math::X* hidden) {
  const int64_t rank = l.groups[item.group].rank;
  for (int64_t r = 0; r < rank; r += kWidth) {
    Vec sum = load(hidden_of(l, item.module, 0, row) + r);
    for (int64_t part = 1; part < l.parts; ++part) sum = add(sum, load(hidden_of(l, item.module, part, row) + r));
    if constexpr (std::is_same_v<typename Math::Weight, int8_t>) sum = mul(sum, load_part(scales_of(l, item) + r, smaller(rank - r, kWidth)));
    Math::narrow(sum, hidden + r);
  }
}

// y += hidden B for the columns of an item and M rows, whose hidden [rank] lie at `hidden`.
template <typename Math, int M>
INLINE void up_rows(const Lora& l, const LoraItem& item, int64_t at, const typename Math::X* const (&hidden)[M],
                    const typename Math::Weight* b, const typename Math::Weight* ahead) {
  const LoraModule& module = l.modules[item.module];
  const int64_t rank = l.groups[item.group].rank, end = smaller(item.first + kColumnBlock, module.n);
  const int64_t first = first_of<typename Math::Weight>(l, item, false);
  for (int64_t column = item.first; column < end; column += kLoraPanel) {
    with_columns(module.n - column, [&](auto columns) {
      constexpr int kColumns = columns, V = kVectors<kColumns>;
      const int64_t from = column * rank / Math::kDepth, left = smaller(module.n - column, kColumns);
      const bool whole = left == V * kWidth;
      const auto part_of = [left](int v) { return left > v * kWidth ? smaller(left - v * kWidth, kWidth) : 0; };
      float* y[M];
      Vec acc[M][V];
      for (int m = 0; m < M; ++m) {
        y[m] = l.y + l.rows[at + m] * l.n + module.column + column;
        for (int v = 0; v < V; ++v) acc[m][v] = whole ? load(y[m] + v * kWidth) : load_part(y[m] + v * kWidth, part_of(v));
      }
      Math::template multiply<kColumns>(hidden, b + from, rank / Math::kDepth, ahead + from - first, acc);
      for (int m = 0; m < M; ++m) {
        for (int v = 0; v < V; ++v) whole ? store(y[m] + v * kWidth, acc[m][v]) : store_part(y[m] + v * kWidth, acc[m][v], part_of(v));
      }
    });
  }
}

// pass(item, the A or B, where its part of it begins, where that of the next one does) for every item. Adapters lie far apart, so that the
// hardware's own prefetching starts over with each: the first rows that pass over an item's weights fetch those of the next one, a line for
// a line.
template <typename T, typename Pass>
INLINE void each_item(const Lora& l, const LoraItem* items, int64_t count, bool down, int64_t begin, int64_t end, Pass pass) {
  for (int64_t i = begin; i < end; ++i) {
    const auto begin_of = [&](const LoraItem& item) { return weights_of<T>(l, item, down) + first_of<T>(l, item, down); };
    const T* own = begin_of(items[i]);
    pass(items[i], weights_of<T>(l, items[i], down), own, i + 1 < count ? begin_of(items[i + 1]) : own);
  }
}

constexpr int kLoraRows = kWidth == 16 ? 8 : 3;  // rows that share a pass over weights; of AVX2 the sums of three fill the registers

template <typename Math>
void lora_down(const Lora& l, int64_t begin, int64_t end) {
  using T = typename Math::Weight;
  each_item<T>(l, l.down, l.down_count, true, begin, end, [&](const LoraItem& item, const T* a, const T* own, const T* next) {
    const LoraGroup& group = l.groups[item.group];
    in_blocks<kLoraRows, 2>(group.begin, group.end, [&](auto rows, int64_t at) {
      down_rows<Math, decltype(rows)::value>(l, item, at, a, at == group.begin ? next : own);
    });
  });
}

template <typename Math>
void lora_up(const Lora& l, int64_t begin, int64_t end) {
  using T = typename Math::Weight;
  using X = typename Math::X;
  thread_local Memory memory;
  X* const joined = reinterpret_cast<X*>(memory.reserve(kLoraRows * l.hidden_stride));
  each_item<T>(l, l.up, l.up_count, false, begin, end, [&](const LoraItem& item, const T* b, const T* own, const T* next) {
    const LoraGroup& group = l.groups[item.group];
    in_blocks<kLoraRows, 2>(group.begin, group.end, [&](auto rows, int64_t at) {
      constexpr int M = decltype(rows)::value;
      const X* hidden[M];
      for (int m = 0; m < M; ++m) {
        X* const of_row = joined + m * l.hidden_stride;
        join_parts<Math>(l, item, l.rows[at + m], of_row);
        hidden[m] = of_row;
      }
      up_rows<Math, M>(l, item, at, hidden, b, at == group.begin ? next : own);
    });
  });
}

#if !defined(__AVX512BF16__)
using Bf16Lora = WideLora<uint32_t>;
#elif !defined(__AMX_BF16__)
using Bf16Lora = DotPairsLora;
#endif

#ifndef __AMX_BF16__

constexpr auto lora_down_bf16 = lora_down<Bf16Lora>;
constexpr auto lora_up_bf16 = lora_up<Bf16Lora>;
constexpr bool kLoraRounded = std::is_same_v<Bf16Lora::X, uint16_t>;

#endif
