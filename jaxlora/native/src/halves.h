// y = x @ w in half precision, for CPUs whose multiply-adds take twice as many float16 as float32. A sum over kHalfChunk values of k
// runs in float16 in ascending order, then goes to a float32: a row comes out the same bit for bit beside any number of other rows.
//
// Of random values the result is off by 0.08 % of its root mean square, half of what rounding x to bfloat16 costs. bfloat16 weights
// are exact in float16 down to 2^-14. Rows of x are scaled by a power of two, so that no sum leaves the range of float16.

#ifdef __AVX512FP16__

constexpr int64_t kHalfChunk = 32;
constexpr int kHalfRows = 14;  // 14 rows x 2 panels of sums + 2 of weights + 1 of x of the 32 registers

INLINE void add_halves(float* sums, __m512h halves) {
  const __m512i bits = _mm512_castph_si512(halves);
  const Vec low = _mm512_cvtxph_ps(_mm256_castsi256_ph(_mm512_castsi512_si256(bits)));
  const Vec high = _mm512_cvtxph_ps(_mm256_castsi256_ph(_mm512_extracti64x4_epi64(bits, 1)));
  store(sums, add(load(sums), low));
  store(sums + kWidth, add(load(sums + kWidth), high));
}

// R rows of P panels that follow each other in memory. Meanwhile what comes next is fetched, as in `tile`.
template <int R, int P>
void half_tile(const uint32_t* x, const uint16_t* w, int64_t k, const char* next, int64_t next_step, float (&sums)[R][P][kPanel]) {
  __builtin_memset(sums, 0, sizeof sums);
  for (int64_t begin = 0; begin < k; begin += kHalfChunk) {
    const int64_t end = smaller(k, begin + kHalfChunk);
    __m512h acc[R][P];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) acc[r][p] = _mm512_setzero_ph();
    for (int64_t i = begin; i < end; ++i, next += next_step) {
      __m512h weights[P];
      for (int p = 0; p < P; ++p) {
        _mm_prefetch(next + 64 * p, _MM_HINT_T1);
        weights[p] = _mm512_castsi512_ph(_mm512_loadu_si512(w + (p * k + i) * kPanel));
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512h value = _mm512_castsi512_ph(_mm512_set1_epi32(static_cast<int>(x[r * k + i])));
        for (int p = 0; p < P; ++p) acc[r][p] = _mm512_fmadd_ph(value, weights[p], acc[r][p]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) add_halves(sums[r][p], acc[r][p]);
  }
}

// Rows [row, row + count) of y for P panels from `panel` on.
template <int R, int P>
void half_rows(const LinearF16& a, int64_t row, int64_t count, int64_t panel, const char* next, int64_t next_step) {
  if (count == R) {
    alignas(64) float sums[R][P][kPanel];
    half_tile<R, P>(a.x + row * a.k, a.w + panel * a.k * kPanel, a.k, next, next_step, sums);
    for (int64_t r = 0; r < R; ++r) {
      const Vec scale = fill(a.scales[row + r]);
      for (int64_t p = 0; p < P; ++p) {
        const int64_t column = (panel + p) * kPanel, columns = smaller(a.n - column, kPanel);
        const Vec scaled[2] = {mul(load(sums[r][p]), scale), mul(load(sums[r][p] + kWidth), scale)};
        store_columns(a.y + (row + r) * a.n + column, scaled, static_cast<int>(columns), a.onto);
      }
    }
  } else if constexpr (R > 1) {
    half_rows<R - 1, P>(a, row, count, panel, next, next_step);
  }
}

template <int P>
void half_panels(const LinearF16& a, int64_t row_begin, int64_t panel) {
  const int64_t rows = smaller(a.m - row_begin, kRowBlock), tiles = (rows + kHalfRows - 1) / kHalfRows;
  const int64_t next_step = P * kPanel * 2 / tiles;  // each tile fetches its share of the next panels
  const char* next = reinterpret_cast<const char*>(a.w + (panel + P) * a.k * kPanel);
  for (int64_t i = 0; i < tiles; ++i, next += a.k * next_step) {
    const int64_t row = rows * i / tiles, after = rows * (i + 1) / tiles;
    half_rows<kHalfRows, P>(a, row_begin + row, after - row, panel, next, next_step);
  }
}

void linear_f16(const LinearF16& a, int64_t begin, int64_t end) {
  const int64_t panel_count = panels(a.n);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = item % panel_count, row_begin = item / panel_count * kRowBlock;
    if (item + 1 < end && panel + 1 < panel_count) {  // two panels share the loads of x
      half_panels<2>(a, row_begin, panel);
      ++item;
    } else {
      half_panels<1>(a, row_begin, panel);
    }
  }
}

// Each value twice, as one load can fill a vector with 32 bits but not with 16.
INLINE __m512i pairs_of_halves(Vec values) {
  const __m512i halves = _mm512_cvtepu16_epi32(_mm256_castph_si256(_mm512_cvtxps_ph(values)));
  return _mm512_or_si512(halves, _mm512_slli_epi32(halves, 16));
}

// The largest value of a row comes to lie in [1, 2).
void halve_rows(const float* x, uint32_t* halves, float* scales, int64_t k, int64_t row_begin, int64_t row_end) {
  const int64_t whole = k / kWidth * kWidth;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* from = x + row * k;
    uint32_t* to = halves + row * k;
    Vec top = zero();
    for (int64_t i = 0; i < whole; i += kWidth) top = max(_mm512_abs_ps(load(from + i)), top);
    if (whole < k) top = max(_mm512_abs_ps(load_part(from + whole, k - whole)), top);
    const float highest = largest(top);
    uint32_t bits;
    __builtin_memcpy(&bits, &highest, 4);
    const uint32_t exponent = bits >> 23 < 1 ? 1 : bits >> 23 > 253 ? 253 : bits >> 23;  // of zeros, infinities and what is near them
    const uint32_t down = (254 - exponent) << 23, up = exponent << 23;
    __builtin_memcpy(&scales[row], &up, 4);
    float factor;
    __builtin_memcpy(&factor, &down, 4);
    for (int64_t i = 0; i < whole; i += kWidth) _mm512_storeu_si512(to + i, pairs_of_halves(mul(load(from + i), fill(factor))));
    if (whole < k) {
      alignas(64) uint32_t pairs[kWidth];
      _mm512_store_si512(pairs, pairs_of_halves(mul(load_part(from + whole, k - whole), fill(factor))));
      __builtin_memcpy(to + whole, pairs, static_cast<size_t>(k - whole) * sizeof(uint32_t));
    }
  }
}

#else

constexpr auto linear_f16 = nullptr;
constexpr auto halve_rows = nullptr;

#endif
