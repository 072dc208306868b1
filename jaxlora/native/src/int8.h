// y = x @ w with int8 weights that share a scale by column and group of k. Rows of x become int8 too, with a scale for each group of
// theirs: the sums of a group are whole numbers, exact in any order, and go to float32 group by group in ascending order. A row comes
// out the same bit for bit beside any number of other rows.
//
// Weights lie as 128 more than they are, without a sign, as the instruction for such dot products wants one factor so. `offsets` takes
// that out again: -128 times the sum of a group of x, where its sums begin.

constexpr int64_t kQuads = kGroup / 4;  // steps of a group; each takes 4 values of k, 32 bits of x
constexpr int64_t kPanelBytes = kPanel * kGroupBytes;  // that a panel's weights of one group of k take

#ifdef __AVX512F__
using Bits = __m512i;
#else
using Bits = __m256i;
#endif

// Whole numbers by lane. GCC 12 keeps arrays of Bits, whose lanes have 64 bits, in memory where it keeps these in registers.
typedef int32_t Ints __attribute__((vector_size(sizeof(Bits))));

INLINE Bits bits(Ints v) {
  return reinterpret_cast<Bits>(v);
}
INLINE Ints ints(Bits v) {
  return reinterpret_cast<Ints>(v);
}
INLINE Ints load_ints(const void* p) {
  Ints v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store_ints(void* p, Ints v) {
  __builtin_memcpy(p, &v, sizeof v);
}

#ifdef __AVX512F__
INLINE Ints fill_ints(int32_t value) {
  return ints(_mm512_set1_epi32(value));
}
INLINE Vec to_floats(Ints v) {
  return _mm512_cvtepi32_ps(bits(v));
}
INLINE Ints to_ints(Vec v) {  // to nearest, ties to even
  return ints(_mm512_cvtps_epi32(v));
}
#else
INLINE Ints fill_ints(int32_t value) {
  return ints(_mm256_set1_epi32(value));
}
INLINE Vec to_floats(Ints v) {
  return _mm256_cvtepi32_ps(bits(v));
}
INLINE Ints to_ints(Vec v) {
  return ints(_mm256_cvtps_epi32(v));
}
#endif

// `of_weights` and `of_x` make of 4 values of k what `dot` multiplies.
#ifdef __AVX512VNNI__

using Quantized = int8_t;
constexpr int kInt8Rows = kTileRows;

INLINE void arrange(Quantized (&)[kGroup]) {}
INLINE Ints of_weights(Ints w) {
  return w;
}
INLINE Ints of_x(const Quantized* x) {
  return fill_ints(read_int(x));
}
INLINE Ints dot(Ints acc, Ints w, Ints x) {
  return ints(_mm512_dpbusd_epi32(bits(acc), bits(w), bits(x)));
}

#else

using Quantized = int16_t;
typedef int16_t Shorts __attribute__((vector_size(sizeof(Bits))));
typedef uint16_t UnsignedShorts __attribute__((vector_size(sizeof(Bits))));

struct Halves {  // in 16 bits: even and odd values of k
  Shorts even, odd;
};

// Of each 4 values the even ones come first, so that both are read as `dot` multiplies them.
INLINE void arrange(Quantized (&group)[kGroup]) {
  uint64_t quads[kQuads];
  __builtin_memcpy(quads, group, sizeof quads);
  for (uint64_t& quad : quads) quad = (quad & 0xffff00000000ffff) | (quad >> 16 & 0xffff0000) | (quad & 0xffff0000) << 16;
  __builtin_memcpy(group, quads, sizeof quads);
}

// Sums of the products of neighbours.
#ifdef __AVX512F__
constexpr int kInt8Rows = kTileRows - 2;  // odd values of weights and of x take three registers more

INLINE Ints multiply_pairs(Shorts a, Shorts b) {
  return ints(_mm512_madd_epi16(reinterpret_cast<Bits>(a), reinterpret_cast<Bits>(b)));
}
#else
constexpr int kInt8Rows = 4;

INLINE Ints multiply_pairs(Shorts a, Shorts b) {
  return ints(_mm256_madd_epi16(reinterpret_cast<Bits>(a), reinterpret_cast<Bits>(b)));
}
#endif

INLINE Halves of_weights(Ints w) {
  return {reinterpret_cast<Shorts>(w) & 0xff, reinterpret_cast<Shorts>(reinterpret_cast<UnsignedShorts>(w) >> 8)};
}
INLINE Halves of_x(const Quantized* x) {
  return {reinterpret_cast<Shorts>(fill_ints(read_int(x))), reinterpret_cast<Shorts>(fill_ints(read_int(x + 2)))};
}
INLINE Ints dot(Ints acc, const Halves& w, const Halves& x) {
  acc = acc + multiply_pairs(w.even, x.even) + multiply_pairs(w.odd, x.odd);
#ifndef __AVX512F__
  asm("" : "+x"(acc));  // otherwise GCC 12 multiplies all that a group of one row has first, and keeps the products in memory
#endif
  return acc;
}

#endif

// Adds the products of 4 values of k, for R rows and two vectors of columns.
template <int R>
INLINE void add_quads(const Quantized* x, int64_t stride, const uint8_t* w, Ints (&sums)[R][2]) {
  const auto w0 = of_weights(load_ints(w)), w1 = of_weights(load_ints(w + 4 * kWidth));
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const auto values = of_x(x + r * stride);
    sums[r][0] = dot(sums[r][0], w0, values);
    sums[r][1] = dot(sums[r][1], w1, values);
  }
}

// R rows of a panel. Meanwhile what comes next is fetched, as in `tile`.
template <int R, bool kLater>
void int8_tile(const LinearI8& a, const Tile& t) {
  const int64_t first = t.row * a.groups;
  const uint8_t* w = a.w + t.panel * a.groups * kPanelBytes;
  const char* next = t.next;
  LaterLines later(t.later, next);
  Vec acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
  for (int64_t g = first; g < first + a.groups; ++g, w += kPanelBytes) {
    Ints sums[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = fill_ints(a.offsets[r * a.groups + g]);
    const auto* scales = reinterpret_cast<const uint16_t*>(w);
    const uint8_t* weights = w + kPanel * sizeof(*scales);
    const Quantized* x = static_cast<const Quantized*>(a.x) + g * kGroup;
    for (int i = 0; i < kQuads; ++i, weights += kPanel * 4, x += 4, next += t.next_step) {
      fetch_step(next);
      if constexpr (kLater) later.fetch(next);
      add_quads<R>(x, a.groups * kGroup, weights, sums);
    }
    const Vec scale0 = load_bf16(scales), scale1 = load_bf16(scales + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec scale = fill(a.scales[r * a.groups + g]);
      acc[r][0] = fma(to_floats(sums[r][0]), mul(scale, scale0), acc[r][0]);
      acc[r][1] = fma(to_floats(sums[r][1]), mul(scale, scale1), acc[r][1]);
    }
  }
  float* y = a.y + t.row * a.n + t.panel * kPanel;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store_columns(y + r * a.n, acc[r], columns_of(a.n, t.panel), a.onto);
}

void linear_i8(const LinearI8& a, int64_t begin, int64_t end) {
  each_tile<kInt8Rows>(a.m, a.n, a.w, a.groups * kPanelBytes, a.groups * kQuads, a.later, begin, end, [&](const Tile& t) {
    with_rows<kInt8Rows>(t.rows, [&](auto rows) {
      constexpr int R = decltype(rows)::value;
      a.later.count ? int8_tile<R, kFetchesLater>(a, t) : int8_tile<R, false>(a, t);
    });
  });
}

// The largest value of a group becomes 127, or -127. A group with a value that is not finite gets a scale that is NaN.
void quantize_rows(const float* x, void* values, float* scales, int32_t* offsets, int64_t k, int64_t row_begin, int64_t row_end) {
  const int64_t groups = (k + kGroup - 1) / kGroup;
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const float* from = x + row * k + g * kGroup;
      alignas(64) float part[kGroup] = {};
      if (const int64_t count = k - g * kGroup; count < kGroup) {
        __builtin_memcpy(part, from, static_cast<size_t>(count) * sizeof(float));
        from = part;
      }
      Vec top = zero(), not_finite = zero();
      for (int i = 0; i < kGroup; i += kWidth) {
        const Vec value = load(from + i);
        top = max(top, max(value, sub(zero(), value)));
        not_finite = fma(value, zero(), not_finite);
      }
      const float highest = largest(top), factor = highest > 1e-36f ? 127.0f / highest : 0.0f;
      alignas(64) int32_t whole[kGroup];
      for (int i = 0; i < kGroup; i += kWidth) store_ints(whole + i, to_ints(mul(load(from + i), fill(factor))));
      Quantized group[kGroup];
      int32_t total = 0;
      for (int i = 0; i < kGroup; ++i) {
        group[i] = static_cast<int8_t>(whole[i]);
        total += group[i];
      }
      arrange(group);
      __builtin_memcpy(static_cast<Quantized*>(values) + (row * groups + g) * kGroup, group, sizeof group);
      scales[row * groups + g] = highest / 127.0f + sum(not_finite);
      offsets[row * groups + g] = -128 * total;
    }
  }
}
