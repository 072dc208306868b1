// What the kernels use of AVX-512, in plain C++ by Intel's description of each intrinsic, so that a CPU without it can run them too
// (https://www.intel.com/content/www/us/en/docs/intrinsics-guide). Included before all else by `emulation.py`.
#pragma once

// First, and as a CPU without AVX-512 sees it: the types, and the names that are taken over below.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#ifdef EMULATE_VNNI
#define __AVX512VNNI__ 1
#endif
#ifdef EMULATE_BF16
#define __AVX512BF16__ 1
#endif
#ifdef EMULATE_FP16
#define __AVX512FP16__ 1
#endif
#ifdef EMULATE_AMX
#define __AMX_BF16__ 1
#define __AVX512VBMI__ 1
#endif

namespace emulated {
namespace {

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Shorts = int16_t __attribute__((vector_size(64)));
using Halfwords = uint16_t __attribute__((vector_size(64)));
using HalfHalfwords = uint16_t __attribute__((vector_size(32)));
using Chars = int8_t __attribute__((vector_size(64)));
using Bytes = uint8_t __attribute__((vector_size(64)));
using Quarter = uint8_t __attribute__((vector_size(16)));
using Halves = _Float16 __attribute__((vector_size(64)));
using HalfHalves = _Float16 __attribute__((vector_size(32)));

template <typename To, typename From>
To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
template <typename T>
T read(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}
template <typename V>
void write(void* p, V value) {
  std::memcpy(p, &value, sizeof(value));
}
template <typename V, typename Lane>
V lanes(Lane lane) {
  V v{};
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(v[0])); ++i) v[i] = lane(i);
  return v;
}

// The same bits under another type, or a part of them.
__m512i castps_si512(__m512 a) { return as<__m512i>(a); }
__m512d castps_pd(__m512 a) { return as<__m512d>(a); }
__m512 castsi512_ps(__m512i a) { return as<__m512>(a); }
__m512h castsi512_ph(__m512i a) { return as<__m512h>(a); }
__m512i castph_si512(__m512h a) { return as<__m512i>(a); }
__m256h castsi256_ph(__m256i a) { return as<__m256h>(a); }
__m256i castph_si256(__m256h a) { return as<__m256i>(a); }
__m256i castsi512_si256(__m512i a) { return read<__m256i>(&a); }
__m256 castps512_ps256(__m512 a) { return read<__m256>(&a); }
__m256d extractf64x4_pd(__m512d a, int i) { return read<__m256d>(reinterpret_cast<char*>(&a) + 32 * i); }
__m256i extracti64x4_epi64(__m512i a, int i) { return read<__m256i>(reinterpret_cast<char*>(&a) + 32 * i); }

__m512 setzero_ps() { return __m512{}; }
__m512h setzero_ph() { return __m512h{}; }
__m512 set1_ps(float value) { return lanes<Floats>([&](int) { return value; }); }
__m512i set1_epi32(int value) { return as<__m512i>(lanes<Ints>([&](int) { return value; })); }

__m512 loadu_ps(const void* p) { return read<__m512>(p); }
__m512i loadu_si512(const void* p) { return read<__m512i>(p); }
void storeu_ps(void* p, __m512 v) { write(p, v); }
void storeu_si512(void* p, __m512i v) { write(p, v); }
void store_si512(void* p, __m512i v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  write(p, v);
}
// Lanes that the mask leaves out are not touched in memory.
__m512i maskz_loadu_epi16(uint32_t mask, const void* p) {
  const auto* from = static_cast<const char*>(p);
  return as<__m512i>(lanes<Halfwords>([&](int i) { return mask >> i & 1 ? read<uint16_t>(from + 2 * i) : uint16_t{0}; }));
}
__m512 maskz_loadu_ps(uint32_t mask, const void* p) {
  const auto* from = static_cast<const char*>(p);
  return lanes<Floats>([&](int i) { return mask >> i & 1 ? read<float>(from + 4 * i) : 0.0f; });
}

__m512 add_ps(__m512 a, __m512 b) { return a + b; }
__m512 sub_ps(__m512 a, __m512 b) { return a - b; }
__m512 mul_ps(__m512 a, __m512 b) { return a * b; }
__m512 div_ps(__m512 a, __m512 b) { return a / b; }
__m512 fmadd_ps(__m512 a, __m512 b, __m512 c) { return lanes<Floats>([&](int i) { return std::fma(a[i], b[i], c[i]); }); }
__m512 max_ps(__m512 a, __m512 b) { return lanes<Floats>([&](int i) { return a[i] > b[i] ? a[i] : b[i]; }); }  // b where one is NaN
__m512 abs_ps(__m512 a) { return lanes<Floats>([&](int i) { return std::fabs(a[i]); }); }
__m512 roundscale_ps(__m512 a, int) { return lanes<Floats>([&](int i) { return std::nearbyint(a[i]); }); }
__m512 scalef_ps(__m512 a, __m512 b) {
  return lanes<Floats>([&](int i) {
    if (std::isnan(a[i]) || std::isnan(b[i])) return a[i] + b[i];
    return std::ldexp(a[i], static_cast<int>(std::floor(std::fmax(-2000.0f, std::fmin(2000.0f, b[i])))));
  });
}
float reduce_max_ps(__m512 a) {
  float top = a[0];
  for (int i = 1; i < 16; ++i) top = a[i] > top ? a[i] : top;
  return top;
}

__m512i add_epi32(__m512i a, __m512i b) { return as<__m512i>(as<Words>(a) + as<Words>(b)); }
__m512i srli_epi32(__m512i a, int count) { return as<__m512i>(as<Words>(a) >> count); }
__m512i slli_epi32(__m512i a, int count) { return as<__m512i>(as<Words>(a) << count); }
__m512i and_si512(__m512i a, __m512i b) { return a & b; }
__m512i or_si512(__m512i a, __m512i b) { return a | b; }
__m512i set1_epi64(int64_t value) { return __m512i{} + value; }
__m512i broadcast_i32x4(__m128i a) {
  const auto from = as<Quarter>(a);
  return as<__m512i>(lanes<Bytes>([&](int i) { return from[i % 16]; }));
}
__m512i permutexvar_epi8(__m512i index, __m512i a) {
  return as<__m512i>(lanes<Bytes>([&](int i) { return as<Bytes>(a)[as<Bytes>(index)[i] % 64]; }));
}
__m512i multishift_epi64_epi8(__m512i control, __m512i a) {
  return as<__m512i>(lanes<Bytes>([&](int i) {
    const auto word = static_cast<uint64_t>(a[i / 8]);
    const int from = as<Bytes>(control)[i] % 64;
    return static_cast<uint8_t>(from ? word >> from | word << (64 - from) : word);
  }));
}
__m512i unpacklo_epi8(__m512i a, __m512i b) {
  return as<__m512i>(lanes<Bytes>([&](int i) { return as<Bytes>(i % 2 ? b : a)[i / 16 * 16 + i % 16 / 2]; }));
}
__m512i unpackhi_epi8(__m512i a, __m512i b) {
  return as<__m512i>(lanes<Bytes>([&](int i) { return as<Bytes>(i % 2 ? b : a)[i / 16 * 16 + 8 + i % 16 / 2]; }));
}
__m512i madd_epi16(__m512i a, __m512i b) {
  const auto x = as<Shorts>(a), y = as<Shorts>(b);
  return as<__m512i>(lanes<Ints>([&](int i) {
    return static_cast<int32_t>(static_cast<uint32_t>(x[2 * i] * y[2 * i]) + static_cast<uint32_t>(x[2 * i + 1] * y[2 * i + 1]));
  }));
}
__m512i dpbusd_epi32(__m512i c, __m512i a, __m512i b) {
  const auto sums = as<Words>(c);
  const auto x = as<Bytes>(a);
  const auto y = as<Chars>(b);
  return as<__m512i>(lanes<Words>([&](int i) {
    uint32_t sum = sums[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += static_cast<uint32_t>(x[j] * y[j]);
    return sum;
  }));
}

__m512 mask_blend_ps(uint32_t mask, __m512 a, __m512 b) { return lanes<Floats>([&](int i) { return mask >> i & 1 ? b[i] : a[i]; }); }
uint32_t movepi32_mask(__m512i v) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(as<Words>(v)[i] >> 31) << i;
  return mask;
}
uint32_t cmp_ps_mask(__m512 a, __m512 b, int how) {
  if (how != _CMP_EQ_OQ) __builtin_trap();
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(a[i] == b[i]) << i;
  return mask;
}
__m512 shuffle_f32x4(__m512 a, __m512 b, int order) {
  return lanes<Floats>([&](int i) { return (i < 8 ? a : b)[4 * (order >> 2 * (i / 4) & 3) + i % 4]; });
}
__m512 shuffle_ps(__m512 a, __m512 b, int order) {
  return lanes<Floats>([&](int i) { return (i % 4 < 2 ? a : b)[i / 4 * 4 + (order >> 2 * (i % 4) & 3)]; });
}

__m512i cvtepu16_epi32(__m256i a) {
  const auto from = as<HalfHalfwords>(a);
  return as<__m512i>(lanes<Ints>([&](int i) { return from[i]; }));
}
__m512i cvtepi8_epi32(__m128i a) {
  return as<__m512i>(lanes<Ints>([&](int i) { return reinterpret_cast<const int8_t*>(&a)[i]; }));
}
__m512 cvtepi32_ps(__m512i a) {
  const auto from = as<Ints>(a);
  return lanes<Floats>([&](int i) { return static_cast<float>(from[i]); });
}
__m512i cvtps_epi32(__m512 a) {
  return as<__m512i>(lanes<Ints>([&](int i) { return std::fabs(a[i]) < 2147483648.0f ? static_cast<int32_t>(std::nearbyint(a[i])) : INT32_MIN; }));
}

// The instructions of AVX512-BF16 take numbers below the normal ones as zero, and give none.
float normal(float value) { return std::fabs(value) < 1.17549435e-38f ? std::copysign(0.0f, value) : value; }
float of_bf16(uint16_t bits) { return normal(as<float>(static_cast<uint32_t>(bits) << 16)); }
__m512 dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  const auto x = as<Halfwords>(a), y = as<Halfwords>(b);
  return lanes<Floats>([&](int i) {  // the odd one first
    const float odd = normal(std::fma(of_bf16(x[2 * i + 1]), of_bf16(y[2 * i + 1]), normal(c[i])));
    return normal(std::fma(of_bf16(x[2 * i]), of_bf16(y[2 * i]), odd));
  });
}
__m256bh cvtneps_pbh(__m512 v) {
  return as<__m256bh>(lanes<HalfHalfwords>([&](int i) {
    const auto bits = as<uint32_t>(normal(v[i]));
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }));
}

// A tile holds as many rows and bytes of one as its configuration says, the rest is zero.
thread_local uint8_t tile[8][16][64], tile_rows[8];
thread_local uint16_t tile_bytes[8];
void tile_zero(int i) { std::memset(tile[i], 0, sizeof tile[i]); }
void tile_release() {
  for (int i = 0; i < 8; ++i) tile_zero(i), tile_rows[i] = 0, tile_bytes[i] = 0;
}
void tile_loadconfig(const void* p) {
  tile_release();
  const auto* bytes = static_cast<const uint8_t*>(p);
  for (int i = 0; i < 8; ++i) tile_bytes[i] = read<uint16_t>(bytes + 16 + 2 * i), tile_rows[i] = bytes[48 + i];
}
void tile_loadd(int i, const void* p, int64_t stride) {
  tile_zero(i);
  for (int row = 0; row < tile_rows[i]; ++row) std::memcpy(tile[i][row], static_cast<const char*>(p) + row * stride, tile_bytes[i]);
}
void tile_stored(int i, void* p, int64_t stride) {
  for (int row = 0; row < tile_rows[i]; ++row) std::memcpy(static_cast<char*>(p) + row * stride, tile[i][row], tile_bytes[i]);
}
void tile_dpbf16ps(int c, int a, int b) {
  const auto product = [](float x, const uint8_t* y, const uint8_t* z) {
    return normal(std::fma(of_bf16(read<uint16_t>(y)), of_bf16(read<uint16_t>(z)), x));
  };
  for (int row = 0; row < tile_rows[c]; ++row) {
    for (int column = 0; 4 * column < tile_bytes[c]; ++column) {
      float even = 0, odd = 0;
      for (int k = 0; 4 * k < tile_bytes[a]; ++k) {
        const uint8_t *x = tile[a][row] + 4 * k, *w = tile[b][k] + 4 * column;
        even = product(even, x, w), odd = product(odd, x + 2, w + 2);
      }
      uint8_t* to = tile[c][row] + 4 * column;
      write(to, normal(normal(read<float>(to)) + normal(even + odd)));
    }
  }
}

__m512 cvtxph_ps(__m256h v) {
  const auto from = as<HalfHalves>(v);
  return lanes<Floats>([&](int i) { return static_cast<float>(from[i]); });
}
__m256h cvtxps_ph(__m512 v) {
  return as<__m256h>(lanes<HalfHalves>([&](int i) { return static_cast<_Float16>(v[i]); }));
}
__m512h fmadd_ph(__m512h a, __m512h b, __m512h c) {  // a double holds product and sum
  const auto x = as<Halves>(a), y = as<Halves>(b), z = as<Halves>(c);
  return as<__m512h>(lanes<Halves>([&](int i) { return static_cast<_Float16>(static_cast<double>(x[i]) * y[i] + static_cast<double>(z[i])); }));
}

}  // namespace
}  // namespace emulated

#define _mm512_abs_ps emulated::abs_ps
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_set1_epi64 emulated::set1_epi64
#define _mm512_broadcast_i32x4 emulated::broadcast_i32x4
#define _mm512_permutexvar_epi8 emulated::permutexvar_epi8
#define _mm512_multishift_epi64_epi8 emulated::multishift_epi64_epi8
#define _mm512_unpacklo_epi8 emulated::unpacklo_epi8
#define _mm512_unpackhi_epi8 emulated::unpackhi_epi8
#define _mm512_add_ps emulated::add_ps
#define _mm512_and_si512 emulated::and_si512
#define _mm512_castph_si512 emulated::castph_si512
#define _mm512_castps512_ps256 emulated::castps512_ps256
#define _mm512_castps_pd emulated::castps_pd
#define _mm512_castps_si512 emulated::castps_si512
#define _mm512_castsi512_ph emulated::castsi512_ph
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_castsi512_si256 emulated::castsi512_si256
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtxph_ps emulated::cvtxph_ps
#define _mm512_cvtxps_ph emulated::cvtxps_ph
#define _mm512_div_ps emulated::div_ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#define _mm512_extractf64x4_pd emulated::extractf64x4_pd
#define _mm512_extracti64x4_epi64 emulated::extracti64x4_epi64
#define _mm512_fmadd_ph emulated::fmadd_ph
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_mask_blend_ps emulated::mask_blend_ps
#define _mm512_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_movepi32_mask emulated::movepi32_mask
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_or_si512 emulated::or_si512
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_roundscale_ps emulated::roundscale_ps
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_setzero_ph emulated::setzero_ph
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#define _mm512_shuffle_ps emulated::shuffle_ps
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_store_si512 emulated::store_si512
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_sub_ps emulated::sub_ps
#define _mm256_castph_si256 emulated::castph_si256
#define _mm256_castsi256_ph emulated::castsi256_ph
#define _tile_dpbf16ps emulated::tile_dpbf16ps
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_loadd emulated::tile_loadd
#define _tile_release emulated::tile_release
#define _tile_stored emulated::tile_stored
#define _tile_zero emulated::tile_zero
