// Vectors of float32 for the instruction set that this translation unit is compiled for. Included inside the namespace of that
// set, so that no function compiled for one machine is ever called on another.
//
// Every multiply-add is spelled out as one fused operation: results do not hang on what the compiler chooses to contract.

#define INLINE inline __attribute__((always_inline))

#ifdef __AVX512F__

using Vec = __m512;
constexpr int kWidth = 16;
constexpr int kTileRows = 14;  // 14 rows x 2 vectors of sums + 2 of weights + 1 of x fill the 32 registers
constexpr int kUnroll = 1;     // steps along k that a loop makes at once: here arithmetic alone fills the cycles

INLINE Vec zero() {
  return _mm512_setzero_ps();
}
INLINE Vec fill(float value) {
  return _mm512_set1_ps(value);
}
INLINE Vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
INLINE void store(float* p, Vec v) {
  _mm512_storeu_ps(p, v);
}
INLINE Vec add(Vec a, Vec b) {
  return _mm512_add_ps(a, b);
}
INLINE Vec sub(Vec a, Vec b) {
  return _mm512_sub_ps(a, b);
}
INLINE Vec mul(Vec a, Vec b) {
  return _mm512_mul_ps(a, b);
}
INLINE Vec div(Vec a, Vec b) {
  return _mm512_div_ps(a, b);
}
INLINE Vec fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
INLINE Vec max(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}
INLINE Vec round_nearest(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE Vec scale_by_power(Vec a, Vec whole) {
  return _mm512_scalef_ps(a, whole);
}
// Lanes of a where `test` has its sign bit set, the others of b.
INLINE Vec where_negative(Vec test, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(test)), b, a);
}
// The first `count` lanes of a, the others of b.
INLINE Vec first(int count, Vec a, Vec b) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << count) - 1), b, a);
}
INLINE Vec load_bf16(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// Pairs of bfloat16: the even ones (low halves) and the odd ones.
INLINE Vec even_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
INLINE Vec odd_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
INLINE Vec even_bf16(const uint32_t* p) {
  return even_of(_mm512_loadu_si512(p));
}
INLINE Vec odd_bf16(const uint32_t* p) {
  return odd_of(_mm512_loadu_si512(p));
}
INLINE Vec load_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
INLINE float sum(Vec v) {
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
INLINE float largest(Vec v) {
  return _mm512_reduce_max_ps(v);
}
INLINE bool any_equal(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) != 0;
}
// Lane i of the result is the sum of the lanes of rows[i], each added in the same order.
INLINE Vec sums(const Vec (&rows)[16]) {
  Vec pairs[4];  // lane group j of pairs[i]: four partial sums of row 4 j + i
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Vec a = add(_mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x44), _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xee));
    Vec b = add(_mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x44), _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xee));
    pairs[i] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  Vec a = add(_mm512_shuffle_ps(pairs[0], pairs[1], 0x44), _mm512_shuffle_ps(pairs[0], pairs[1], 0xee));
  Vec b = add(_mm512_shuffle_ps(pairs[2], pairs[3], 0x44), _mm512_shuffle_ps(pairs[2], pairs[3], 0xee));
  return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

#else  // AVX2 and FMA

using Vec = __m256;
constexpr int kWidth = 8;
constexpr int kTileRows = 6;  // 6 rows x 2 vectors of sums + 2 of weights + 1 of x, of 16 registers
constexpr int kUnroll = 8;    // steps along k that a loop makes at once: beside so few sums, counters and fetches would cost a tenth

INLINE Vec zero() {
  return _mm256_setzero_ps();
}
INLINE Vec fill(float value) {
  return _mm256_set1_ps(value);
}
INLINE Vec load(const float* p) {
  return _mm256_loadu_ps(p);
}
INLINE void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v);
}
INLINE Vec add(Vec a, Vec b) {
  return _mm256_add_ps(a, b);
}
INLINE Vec sub(Vec a, Vec b) {
  return _mm256_sub_ps(a, b);
}
INLINE Vec mul(Vec a, Vec b) {
  return _mm256_mul_ps(a, b);
}
INLINE Vec div(Vec a, Vec b) {
  return _mm256_div_ps(a, b);
}
INLINE Vec fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
INLINE Vec max(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}
INLINE Vec round_nearest(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE Vec scale_by_power(Vec a, Vec whole) {
  // Below the smallest normal number the result is zero; callers never pass large positive powers.
  __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_max_ps(whole, fill(-127.0f))), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
INLINE Vec where_negative(Vec test, Vec a, Vec b) {
  return _mm256_blendv_ps(b, a, test);
}
INLINE Vec first(int count, Vec a, Vec b) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)));
}
INLINE Vec load_bf16(const uint16_t* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE Vec even_bf16(const uint32_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
}
INLINE Vec odd_bf16(const uint32_t* p) {
  // By shifts, as a mask would take a register that sums of 6 rows need.
  __m256i odd = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16);
  return _mm256_castsi256_ps(_mm256_slli_epi32(odd, 16));
}
INLINE Vec load_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
INLINE float sum(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
INLINE float largest(Vec v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
INLINE bool any_equal(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)) != 0;
}
// Lane i of the result is the sum of the lanes of rows[i], each added in the same order.
INLINE Vec sums(const Vec (&rows)[8]) {
  Vec pairs[4];  // half j of pairs[i]: four partial sums of row 4 j + i
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pairs[i] = add(_mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20), _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31));
  }
  Vec a = add(_mm256_shuffle_ps(pairs[0], pairs[1], 0x44), _mm256_shuffle_ps(pairs[0], pairs[1], 0xee));
  Vec b = add(_mm256_shuffle_ps(pairs[2], pairs[3], 0x44), _mm256_shuffle_ps(pairs[2], pairs[3], 0xee));
  return add(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}

#endif

typedef uint32_t Words __attribute__((vector_size(sizeof(Vec))));

constexpr int kPanel = 2 * kWidth;  // columns of a panel of packed weights: it is read as one stream

INLINE Vec load_value(const float* p) {
  return load(p);
}
INLINE Vec load_value(const uint16_t* p) {
  return load_bf16(p);
}
INLINE Vec load_value(const int8_t* p) {
  return load_int8(p);
}

// The first `count` values, then zeros.
template <typename T>
INLINE Vec load_part(const T* p, int64_t count) {
  alignas(64) T lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load_value(lanes);
}

// The first `count` lanes.
INLINE void store_part(float* p, Vec v, int64_t count) {
  alignas(64) float lanes[kWidth];
  store(lanes, v);
  __builtin_memcpy(p, lanes, static_cast<size_t>(count) * sizeof(float));
}

// What fills a vector: two or four short values in 32 bits.
INLINE int32_t read_int(const void* p) {
  int32_t value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

// To the nearest bfloat16, ties to even; NaN stays NaN.
INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t quiet = (bits >> 16) | 0x40, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

#ifdef __AVX512BF16__
INLINE void store_rounded(Vec values, uint16_t* to) {
  const __m256bh rounded = _mm512_cvtneps_pbh(values);
  __builtin_memcpy(to, &rounded, sizeof rounded);
}
#endif

INLINE void store_value(float* p, float value) {
  *p = value;
}
INLINE void store_value(uint16_t* p, float value) {
  *p = to_bf16(value);
}

constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

constexpr float kLog2E = 1.44269504f;

// 2^x for x <= 0 to about one unit in the last place; 2^-inf is 0. Taylor series of 2^f about 0 on [-1/2, 1/2].
INLINE Vec exp2(Vec x) {
  x = max(fill(-200.0f), x);  // in this order a NaN stays one
  Vec whole = round_nearest(x);
  Vec f = sub(x, whole);
  Vec p = fill(1.5252734e-5f);
  p = fma(p, f, fill(1.5403530e-4f));
  p = fma(p, f, fill(1.3333558e-3f));
  p = fma(p, f, fill(9.6181291e-3f));
  p = fma(p, f, fill(5.5504109e-2f));
  p = fma(p, f, fill(2.4022651e-1f));
  p = fma(p, f, fill(6.9314718e-1f));
  p = fma(p, f, fill(1.0f));
  return scale_by_power(p, whole);
}

// Has `count` values read into the second-level cache, which waits for more lines at a time than the first one does.
template <typename T>
INLINE void fetch(const T* p, int64_t count) {
  for (const char *at = reinterpret_cast<const char*>(p), *end = reinterpret_cast<const char*>(p + count); at < end; at += 64) {
    _mm_prefetch(at, _MM_HINT_T1);
  }
}
