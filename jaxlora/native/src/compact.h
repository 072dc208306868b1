// bfloat16 weights in 12 bits, without loss: the lower half as it is, and of the upper one, sign and the rest of the exponent, the place in a
// table of the panel's own. A trained layer's exponents lie so close together that this leaves out one weight in some two thousand; these lie in a
// list. (Less than three bits of an exponent are information: Zhang et al. 2025, https://arxiv.org/abs/2504.11651, with codes of any length.)

#ifdef __AVX512VBMI__

constexpr int64_t kCodesFar = 4096, kCodesNear = 768;  // so many bytes ahead codes are fetched into the second-level cache, and into the first
constexpr int64_t kCodesBytes = kPanel * 6;             // of two pairs of k
static_assert(kPanel == 32);

// A weight without a code: where it lies among the panel's [pairs of k, column, 2], and what it is.
struct Uncoded {
  uint32_t place, bits;
};

// Makes weights of the codes of a panel, from its first pair of k to its last.
class CompactPanel {
 public:
  CompactPanel(const uint16_t* panel, int64_t k)
      : codes_(reinterpret_cast<const char*>(panel + compact_list(k))), uncoded_(reinterpret_cast<const Uncoded*>(panel + kCompactTable)) {
    table_ = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel)));
  }

  // The next kCompactPairs pairs of k; what there is behind the last is 0. (What the loop uses lies in variables of its own: for all that the compiler
  // knows, weights may be written to members.)
  INLINE void unpack(uint32_t* to) {
    const char* codes = codes_;
    const __m512i table = table_;
    const __m512i even = _mm512_set1_epi64(0x1c1814100c080400), odd = _mm512_set1_epi64(0x3c3834302c282420);
    for (int64_t i = 0; i < kCompactPairs; i += 2, codes += kCodesBytes, to += 2 * kPanel) {
      for (int at = 0; at < kCodesBytes; at += 64) {
        _mm_prefetch(codes + kCodesFar + at, _MM_HINT_T1);
        _mm_prefetch(codes + kCodesNear + at, _MM_HINT_T0);
      }
      const __m512i places = _mm512_loadu_si512(codes + 128);
      join(_mm512_loadu_si512(codes), _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(even, places), table), to);
      join(_mm512_loadu_si512(codes + 64), _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(odd, places), table), to + kPanel);
    }
    codes_ = codes;
    auto* const weights = reinterpret_cast<uint16_t*>(to - kCompactPairs * kPanel);
    for (const int64_t end = done_ + kCompactPairs * kPanel * 2; uncoded_->place < end; ++uncoded_) {
      const auto bits = static_cast<uint16_t>(uncoded_->bits);
      __builtin_memcpy(weights + (uncoded_->place - done_), &bits, sizeof bits);
    }
    done_ += kCompactPairs * kPanel * 2;
  }

 private:
  static INLINE void join(__m512i lower, __m512i upper, uint32_t* to) {
    _mm512_storeu_si512(to, _mm512_unpacklo_epi8(lower, upper));
    _mm512_storeu_si512(to + kWidth, _mm512_unpackhi_epi8(lower, upper));
  }

  const char* codes_;
  const Uncoded* uncoded_;
  __m512i table_;
  int64_t done_ = 0;  // weights
};

#endif
