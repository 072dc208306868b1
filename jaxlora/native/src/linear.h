// y = x @ w with packed weights. A sum runs over k in ascending order in one accumulator, in every tile: a row comes out the same
// bit for bit beside any number of other rows.

// R rows times two vectors of columns. Weights are read once for all R rows.
template <int R>
INLINE void multiply_add(const float* x, int64_t stride, Vec w0, Vec w1, Vec (&acc)[R][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    Vec value = fill(x[r * stride]);
    acc[r][0] = fma(value, w0, acc[r][0]);
    acc[r][1] = fma(value, w1, acc[r][1]);
  }
}

struct F32 {
  using X = float;
  using W = float;
  static constexpr int kDepth = 1;  // values of X that one step takes
  static constexpr int kRows = kTileRows;
  static constexpr int kAtOnce = kUnroll;  // steps that a loop makes at once
  template <int R>
  static INLINE void step(const X* x, int64_t stride, const W* w, Vec (&acc)[R][2]) {
    multiply_add(x, stride, load(w), load(w + kWidth), acc);
  }
  template <int R>
  static INLINE void rest(const X*, int64_t, const W*, Vec (&)[R][2]) {}
};

// bfloat16 weights widened in registers; x stays float32.
struct WideBf16 {
  using X = float;
  using W = uint32_t;
  static constexpr int kDepth = 2;
  static constexpr int kAtOnce = 1;
  static constexpr int kRows = kTileRows - kTileRows / 14;  // the mask of the odd values takes the last of AVX-512's registers
  template <int R>
  static INLINE void step(const X* x, int64_t stride, const W* w, Vec (&acc)[R][2]) {
    multiply_add(x, stride, even_bf16(w), even_bf16(w + kWidth), acc);
    multiply_add(x + 1, stride, odd_bf16(w), odd_bf16(w + kWidth), acc);
  }
  template <int R>  // the last value of an odd k
  static INLINE void rest(const X* x, int64_t stride, const W* w, Vec (&acc)[R][2]) {
    multiply_add(x, stride, even_bf16(w), even_bf16(w + kWidth), acc);
  }
};

#ifdef __AVX512BF16__

// Dot products of pairs; x has been rounded to pairs of bfloat16 by `round_rows`, padded with a zero.
struct PairsBf16 {
  using X = uint32_t;
  using W = uint32_t;
  static constexpr int kDepth = 1;
  static constexpr int kRows = kTileRows;
  static constexpr int kAtOnce = 1;
  template <int R>
  static INLINE void step(const X* x, int64_t stride, const W* w, Vec (&acc)[R][2]) {
    __m512bh w0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w)),
             w1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + kWidth));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x[r * stride])));
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w0, pair);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], w1, pair);
    }
  }
  template <int R>
  static INLINE void rest(const X*, int64_t, const W*, Vec (&)[R][2]) {}
};

#endif

// The first `columns` of a panel, or all, go to y, or onto what it holds.
INLINE void store_columns(float* y, const Vec (&values)[2], int columns, bool onto) {
  if (columns == kPanel) {
    store(y, onto ? add(load(y), values[0]) : values[0]);
    store(y + kWidth, onto ? add(load(y + kWidth), values[1]) : values[1]);
  } else {
    alignas(64) float lanes[kPanel];
    store(lanes, values[0]);
    store(lanes + kWidth, values[1]);
    for (int i = 0; onto && i < columns; ++i) lanes[i] += y[i];
    __builtin_memcpy(y, lanes, static_cast<size_t>(columns) * sizeof(float));
  }
}

// On AVX2 a product of one row loses by that what its adapters gain, and one of 4 rows or more loses more.
constexpr bool kFetchesLater = kWidth == 16;

// Fetches blocks of `Later` into the second-level cache, a line at each call; once they are through, lines from a place given.
class LaterLines {
 public:
  INLINE LaterLines(const Later& later, const char* instead)
      : from_(later.from), start_(later.start), block_(later.blocks), end_(later.blocks + later.count), line_(instead) {}
  INLINE void fetch(const char* instead) {
    if (left_ == 0) line_ = block_ < end_ ? next_block() : instead, left_ = kLaterLines;
    _mm_prefetch(line_, _MM_HINT_T1);
    line_ += 64, --left_;
  }

 private:
  INLINE const char* next_block() {
    const LaterBlock block = *block_++;
    return from_ + block.at + start_ * block.of_start;
  }

  const char* from_;
  int64_t start_;
  const LaterBlock *block_, *end_;
  const char* line_;
  int64_t left_ = 0;
};

// Weights that come next are fetched into the second-level cache, so that memory never waits for arithmetic.
INLINE void fetch_step(const char* next) {
  for (int at = 0; at < kPanel * 4; at += 64) _mm_prefetch(next + at, _MM_HINT_T1);
}

// The same for some steps, each of so many bytes: a line is enough beside many tiles.
template <int kSteps>
INLINE void fetch_steps(const char* next, int64_t next_step) {
  fetch_step(next);
  for (int64_t at = kPanel * 4; kSteps > 1 && at < kSteps * next_step; at += kPanel * 4) fetch_step(next + at);
}

// R rows of a panel. k and stride count values of X. Meanwhile what comes next is fetched, `next_step` bytes a step, and the places of the
// results into the first-level cache: a product of many rows and columns is larger than a cache.
template <typename Step, int R, bool kLater>
void tile(const typename Step::X* x, const typename Step::W* w, const Update& update, float* y, int64_t k, int64_t y_stride,
          int columns, bool onto, const char* next, int64_t next_step, const Later& later) {
  LaterLines lines(later, next);
  Vec acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    acc[r][0] = acc[r][1] = zero();
    __builtin_prefetch(y + r * y_stride, 1);
    __builtin_prefetch(y + r * y_stride + kWidth, 1);
  }
  constexpr int kValues = Step::kAtOnce * Step::kDepth;
  int64_t i = 0;
  for (; i + kValues <= k; i += kValues, next += Step::kAtOnce * next_step) {
    fetch_steps<Step::kAtOnce>(next, next_step);
#pragma GCC unroll 8
    for (int j = 0; j < kValues; j += Step::kDepth, w += kPanel) {
      if constexpr (kLater) lines.fetch(next);
      Step::step(x + i + j, k, w, acc);
    }
  }
  for (; Step::kAtOnce > 1 && i + Step::kDepth <= k; i += Step::kDepth, w += kPanel, next += next_step) {
    fetch_step(next);
    if constexpr (kLater) lines.fetch(next);
    Step::step(x + i, k, w, acc);
  }
  if (i < k) Step::rest(x + i, k, w, acc);
  for (int64_t j = 0; j < update.ranks; ++j) {
    const float* b = update.b + j * kPanel;
    multiply_add(update.h + j, update.ranks, load(b), load(b + kWidth), acc);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store_columns(y + r * y_stride, acc[r], columns, onto);
}

// body(rows as a constant), for a number of rows up to R.
template <int R, typename Body>
INLINE void with_rows(int64_t rows, const Body& body) {
  if (rows == R) {
    body(std::integral_constant<int, R>());
  } else if constexpr (R > 1) {
    with_rows<R - 1>(rows, body);
  }
}

// A part of a product: some rows of one panel, and where the weights of the next panel lie of which it fetches its share, so many
// bytes a step.
struct Tile {
  int64_t row, rows, panel;
  const char* next;
  int64_t next_step;
  Later later;
};

INLINE int64_t panels(int64_t n) {
  return (n + kPanel - 1) / kPanel;
}

// Share i of n.
INLINE Later share(const Later& later, int64_t i, int64_t n) {
  const int64_t first = later.count * i / n;
  return {later.from, later.start, later.blocks + first, later.count * (i + 1) / n - first};
}

// body(tile) for items [begin, end) of y [m, n], in tiles of at most kRows rows, a multiple of kMultiple of them but for the last. A panel has
// `bytes` and is read in so many steps.
template <int kRows, int kMultiple = 1, typename Body>
INLINE void each_tile(int64_t m, int64_t n, const void* w, int64_t bytes, int64_t steps, const Later& later, int64_t begin, int64_t end,
                      const Body& body) {
  const int64_t panel_count = panels(n), items = (m + kRowBlock - 1) / kRowBlock * panel_count;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = item % panel_count, row_begin = item / panel_count * kRowBlock;
    const int64_t rows = smaller(m - row_begin, kRowBlock), tiles = (rows + kRows - 1) / kRows;
    const int64_t next_step = kPanel * 4 / tiles;
    const char* next = static_cast<const char*>(w) + (panel + 1) * bytes;
    const Later of_item = share(later, item, items);
    const auto until = [&](int64_t i) { return i < tiles ? filled_up(rows * i / tiles, kMultiple) : rows; };
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = until(i);
      body(Tile{row_begin + row, until(i + 1) - row, panel, next + i * steps * next_step, next_step, share(of_item, i, tiles)});
    }
  }
}

INLINE int columns_of(int64_t n, int64_t panel) {
  return static_cast<int>(smaller(n - panel * kPanel, kPanel));
}

// A tile of which x and k count values of X; `panel` are its weights.
template <typename Step>
INLINE void multiply_tile(const Linear& a, const Tile& t, int64_t k, const typename Step::W* panel, int64_t next_step) {
  const auto* x = static_cast<const typename Step::X*>(a.x) + t.row * k;
  const Update update{a.update.h + t.row * a.update.ranks, a.update.b + t.panel * a.update.ranks * kPanel, a.update.ranks};
  with_rows<Step::kRows>(t.rows, [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    (a.later.count ? tile<Step, R, kFetchesLater> : tile<Step, R, false>)(x, panel, update, a.y + t.row * a.n + t.panel * kPanel, k, a.n,
                                                                 columns_of(a.n, t.panel), a.onto, t.next, next_step, t.later);
  });
}

// `k` and `of_panel` count values of X.
template <typename Step>
INLINE void linear(const Linear& a, int64_t k, int64_t of_panel, int64_t begin, int64_t end) {
  const int64_t steps = (k + Step::kDepth - 1) / Step::kDepth, values = (of_panel + Step::kDepth - 1) / Step::kDepth * kPanel;
  const auto* w = static_cast<const typename Step::W*>(a.w);
  each_tile<Step::kRows>(a.m, a.n, w, values * sizeof *w, steps, a.later, begin, end,
                         [&](const Tile& t) { multiply_tile<Step>(a, t, k, w + t.panel * values, t.next_step); });
}

void linear_f32(const Linear& a, int64_t begin, int64_t end) {
  linear<F32>(a, a.k, a.of_panel, begin, end);
}

#ifdef __AVX512BF16__

#ifdef __AMX_BF16__
constexpr int kRoundedTo = 32;  // linear_bf16 is that of tiles.h
#else
constexpr int kRoundedTo = 2;

void linear_bf16(const Linear& a, int64_t begin, int64_t end) {
  linear<PairsBf16>(a, (a.k + 1) / 2, (a.of_panel + 1) / 2, begin, end);
}
#endif

void round_rows(const float* x, uint16_t* rounded, int64_t k, int64_t row_begin, int64_t row_end) {
  const int64_t padded = filled_up(k, kRoundedTo);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* from = x + row * k;
    uint16_t* to = rounded + row * padded;
    int64_t i = 0;
    for (; i + kWidth <= k; i += kWidth) store_rounded(load(from + i), to + i);
    for (; i < k; ++i) to[i] = to_bf16(from[i]);
    for (; i < padded; ++i) to[i] = 0;
  }
}

#else

constexpr bool kWidens = kWidth == 8;
constexpr int64_t kWidenedRows = 24, kWidenedBytes = 256 << 10;  // rows that pay for it, and a panel that the second-level cache holds

// With many rows a panel is widened once, instead of by every tile: the same products in the same order.
void linear_widened(const Linear& a, int64_t begin, int64_t end) {
  const int64_t steps = (a.k + 1) / 2, values = steps * kPanel, of_panel = (a.of_panel + 1) / 2 * kPanel;
  const auto* w = static_cast<const uint32_t*>(a.w);
  thread_local Memory memory;
  float* panel = memory.reserve(2 * values);
  int64_t widened = -1;
  each_tile<F32::kRows>(a.m, a.n, w, of_panel * sizeof *w, steps, a.later, begin, end, [&](const Tile& t) {
    if (t.panel != widened) {
      for (int64_t i = 0; i < values; i += kWidth) {
        const int64_t step = i / kPanel * kPanel;
        store(panel + step + i, even_bf16(w + t.panel * of_panel + i));
        store(panel + step + i + kPanel, odd_bf16(w + t.panel * of_panel + i));
      }
      widened = t.panel;
    }
    multiply_tile<F32>(a, t, a.k, panel, t.next_step / 2);
  });
}

void linear_bf16(const Linear& a, int64_t begin, int64_t end) {
  if (kWidens && a.m >= kWidenedRows && a.k * kPanel * 4 <= kWidenedBytes) {
    linear_widened(a, begin, end);
  } else {
    linear<WideBf16>(a, a.k, a.of_panel, begin, end);
  }
}

constexpr auto round_rows = nullptr;
constexpr int kRoundedTo = 1;

#endif
