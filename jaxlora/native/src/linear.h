// y = x @ w with packed weights. A sum runs over k in ascending order in one accumulator, in every tile: a row comes out the same
// bit for bit beside any number of other rows.

#ifdef __AVX512BF16__

using Rounded = uint16_t;  // x for bfloat16 weights: pairs of bfloat16

struct Bf16Step {
  static constexpr int kDepth = 2;
  using X = uint32_t;
  using W = uint32_t;
  template <int R>
  static INLINE void step(const X* x, int64_t stride, const W* w, Vec (&acc)[R][2]) {
    __m512bh w0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w)), w1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + kWidth));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x[r * stride])));
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w0, pair);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], w1, pair);
    }
  }
};

#else

using Rounded = float;  // x for bfloat16 weights: rounded, but kept as float32, since the weights are widened in registers

struct Bf16Step {
  static constexpr int kDepth = 2;
  struct X {
    float even, odd;
  };
  using W = uint32_t;
  template <int R>
  static INLINE void step(const X* x, int64_t stride, const W* w, Vec (&acc)[R][2]) {
    Vec w0 = even_bf16(w), w1 = even_bf16(w + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec value = fill(x[r * stride].even);
      acc[r][0] = fma(value, w0, acc[r][0]);
      acc[r][1] = fma(value, w1, acc[r][1]);
    }
    w0 = odd_bf16(w), w1 = odd_bf16(w + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec value = fill(x[r * stride].odd);
      acc[r][0] = fma(value, w0, acc[r][0]);
      acc[r][1] = fma(value, w1, acc[r][1]);
    }
  }
};

#endif

struct F32Step {
  static constexpr int kDepth = 1;
  using X = float;
  using W = float;
  template <int R>
  static INLINE void step(const X* x, int64_t stride, const W* w, Vec (&acc)[R][2]) {
    Vec w0 = load(w), w1 = load(w + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec value = fill(x[r * stride]);
      acc[r][0] = fma(value, w0, acc[r][0]);
      acc[r][1] = fma(value, w1, acc[r][1]);
    }
  }
};

constexpr int kAhead = 32;  // steps of k that weights are prefetched ahead: 4 KiB of one stream, past the end of a page

// R rows of a panel, two vectors of columns at a time. `steps` is the number of weights of a column, or of pairs of them.
template <typename Step, int R>
void tile(const typename Step::X* x, const typename Step::W* w, float* y, int64_t steps, int64_t y_stride, int columns) {
  for (int column = 0; column < columns; column += 2 * kWidth) {
    Vec acc[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
    const typename Step::W* weights = w + column;
    for (int64_t k = 0; k < steps; ++k, weights += kPanel) {
      _mm_prefetch(reinterpret_cast<const char*>(weights + kAhead * kPanel), _MM_HINT_T0);
      if (kWidth == 16) _mm_prefetch(reinterpret_cast<const char*>(weights + kAhead * kPanel + kWidth), _MM_HINT_T0);
      Step::step(x + k, steps, weights, acc);
    }
    int width = columns - column;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* out = y + r * y_stride + column;
      if (width >= 2 * kWidth) {
        store(out, acc[r][0]);
        store(out + kWidth, acc[r][1]);
      } else {
        alignas(64) float lanes[2 * kWidth];
        store(lanes, acc[r][0]);
        store(lanes + kWidth, acc[r][1]);
        __builtin_memcpy(out, lanes, static_cast<size_t>(width) * sizeof(float));
      }
    }
  }
}

template <typename Step, int R>
INLINE void tile_of(int rows, const typename Step::X* x, const typename Step::W* w, float* y, int64_t steps, int64_t n, int columns) {
  if (rows == R) {
    tile<Step, R>(x, w, y, steps, n, columns);
  } else if constexpr (R > 1) {
    tile_of<Step, R - 1>(rows, x, w, y, steps, n, columns);
  }
}

template <typename Step>
void linear(const Linear& a, int64_t begin, int64_t end) {
  const int64_t steps = (a.k + Step::kDepth - 1) / Step::kDepth, panel_count = panels(a.n);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = item % panel_count, row_begin = item / panel_count * kRowBlock;
    const int64_t rows = a.m - row_begin < kRowBlock ? a.m - row_begin : kRowBlock;
    const int64_t columns = a.n - panel * kPanel < kPanel ? a.n - panel * kPanel : kPanel;
    const auto* w = static_cast<const typename Step::W*>(a.w) + panel * steps * kPanel;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = row_begin + rows * i / tiles, next = row_begin + rows * (i + 1) / tiles;
      tile_of<Step, kTileRows>(static_cast<int>(next - row), static_cast<const typename Step::X*>(a.x) + row * steps, w,
                               a.y + row * a.n + panel * kPanel, steps, a.n, static_cast<int>(columns));
    }
  }
}

void round_rows(const float* x, void* rounded, int64_t k, int64_t row_begin, int64_t row_end) {
  const int64_t padded = (k + 1) / 2 * 2;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* from = x + row * k;
    Rounded* to = static_cast<Rounded*>(rounded) + row * padded;
    for (int64_t i = 0; i < k; ++i) {
      const uint16_t bits = to_bf16(from[i]);
      if constexpr (sizeof(Rounded) == 2) {
        to[i] = static_cast<Rounded>(bits);
      } else {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        __builtin_memcpy(&to[i], &wide, 4);
      }
    }
    if (padded > k) to[k] = 0;
  }
}
