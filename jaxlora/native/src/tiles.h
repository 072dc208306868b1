// The same products with bfloat16 weights on CPUs with AMX, Intel's Advanced Matrix Extensions (Intel 64 and IA-32 Architectures
// Optimization Reference Manual, chapter 20): registers of 16 rows of 64 bytes, and an instruction that multiplies two of them. A panel of
// packed weights has the form that it takes. A sum runs over k in ascending order, 32 values at a time, whatever the number of rows: those
// of the even and those of the odd ones of these, in float32, are added to each other and then to what there was.

#ifdef __AMX_BF16__

constexpr int64_t kTile = 16;              // rows of a tile, and float32 values in one
constexpr int64_t kTileDepth = 2 * kTile;  // values of k that two tiles multiply
static_assert(kRoundedTo == kTileDepth && kRowsAtOnce == kTile);
constexpr int64_t kLineBytes = kPanel * 4;  // from a pair of k to the next one in a panel

// Lets this thread use tiles until `_tile_release`: 0 to 3 for sums [rows, columns], 4 and 5 for rows [rows, pairs of k], 6 and 7 for weights
// [pairs of k, columns], of 32 bits each.
INLINE void shape_tiles(int64_t rows, int64_t pairs, int64_t columns) {
  struct alignas(64) {
    uint8_t palette = 1, rest[15] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int i = 0; i < 8; ++i) {
    shapes.rows[i] = static_cast<uint8_t>(i < 6 ? rows : pairs);
    shapes.row_bytes[i] = static_cast<uint16_t>(4 * (i == 4 || i == 5 ? pairs : columns));
  }
  asm volatile("" ::"r"(&shapes) : "memory");  // GCC's intrinsics don't say what they read
  _tile_loadconfig(&shapes);
}

// Tiles of one shape after another, while it lives.
class Tiles {
 public:
  Tiles() = default;
  Tiles(int64_t rows, int64_t pairs, int64_t columns) { shape(rows, pairs, columns); }
  ~Tiles() { _tile_release(); }

  // What tiles held is lost where their shape changes.
  void shape(int64_t rows, int64_t pairs, int64_t columns) {
    if (rows == rows_ && pairs == pairs_ && columns == columns_) return;
    rows_ = rows, pairs_ = pairs, columns_ = columns;
    shape_tiles(rows, pairs, columns);
  }

 private:
  int64_t rows_ = 0, pairs_ = 0, columns_ = 0;
};

// The first N tiles of sums: in memory they lie `apart` values from each other, and their rows `stride`.
template <int N>
INLINE void zero_sums() {
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (N > 2) _tile_zero(2);
  if constexpr (N > 3) _tile_zero(3);
}
template <int N>
INLINE void load_sums(const float* from, int64_t apart, int64_t stride) {
  _tile_loadd(0, from, 4 * stride);
  if constexpr (N > 1) _tile_loadd(1, from + apart, 4 * stride);
  if constexpr (N > 2) _tile_loadd(2, from + 2 * apart, 4 * stride);
  if constexpr (N > 3) _tile_loadd(3, from + 3 * apart, 4 * stride);
}
template <int N>
INLINE void store_sums(float* to, int64_t apart, int64_t stride) {
  _tile_stored(0, to, 4 * stride);
  if constexpr (N > 1) _tile_stored(1, to + apart, 4 * stride);
  if constexpr (N > 2) _tile_stored(2, to + 2 * apart, 4 * stride);
  if constexpr (N > 3) _tile_stored(3, to + 3 * apart, 4 * stride);
  asm volatile("" ::: "memory");  // GCC's intrinsics don't say what they write, either
}

// Onto tiles 0 and 1, and for rows past the first 16 onto 2 and 3: 32 values of k of the rows by those of a panel.
template <bool kTwo>
INLINE void multiply_tiles(const uint16_t* x, int64_t stride, const uint32_t* w) {
  _tile_loadd(4, x, 2 * stride);
  _tile_loadd(6, w, kLineBytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, w + kTile, kLineBytes);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kTwo) {
    _tile_loadd(5, x + kTile * stride, 2 * stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// sums [16 or 32, kPanel]
template <bool kTwo>
INLINE void store_tiles(float* sums) {
  _tile_stored(0, sums, kLineBytes);
  _tile_stored(1, sums + kTile, kLineBytes);
  if constexpr (kTwo) {
    _tile_stored(2, sums + kTile * kPanel, kLineBytes);
    _tile_stored(3, sums + kTile * kPanel + kTile, kLineBytes);
  }
  asm volatile("" ::: "memory");  // nor what they write
}

// Where the weights of a panel come from: `block` gives those of the next 16 pairs of k, with zeros behind the last pair, to be used before the
// next but one. Packed as they are they lie there, and meanwhile what comes next is fetched, as in `tile`, but not what comes later: weights pass
// through tiles no faster than memory gives them.
class PlainBlocks {
 public:
  PlainBlocks(const uint32_t* w, int64_t pairs, const Tile& t) : w_(w), left_(pairs), next_(t.next), next_block_(kTile * t.next_step) {}
  INLINE const uint32_t* block() {
    for (const char* end = next_ + next_block_; next_ < end; next_ += 64) _mm_prefetch(next_, _MM_HINT_T1);
    const uint32_t* block = w_;
    if (left_ < kTile) {
      __builtin_memset(last_, 0, sizeof last_);
      __builtin_memcpy(last_, block, static_cast<size_t>(left_ * kLineBytes));
      asm volatile("" ::"r"(last_) : "memory");
      block = last_;
    }
    w_ += kTile * kPanel, left_ -= kTile;
    return block;
  }

 private:
  const uint32_t* w_;
  int64_t left_;
  const char* next_;
  int64_t next_block_;
  alignas(64) uint32_t last_[kTile * kPanel];
};

static_assert(kCompactPairs == kTile);

// Of a compact panel, into two places in turns: one is multiplied while the other is written.
class CompactBlocks {
 public:
  CompactBlocks(const uint16_t* panel, int64_t k) : panel_(panel, k) {}
  INLINE const uint32_t* block() {
    uint32_t* block = blocks_[second_];
    panel_.unpack(block);
    asm volatile("" ::"r"(block) : "memory");
    second_ = !second_;
    return block;
  }

 private:
  CompactPanel panel_;
  bool second_ = false;
  alignas(64) uint32_t blocks_[2][kTile * kPanel];
};

// Products of up to 16 rows, or up to 32, with the panel that has so many pairs of k.
template <bool kTwo, typename Blocks>
void tiles_of_panel(const uint16_t* x, int64_t stride, Blocks& w, int64_t pairs, float* sums) {
  zero_sums<kTwo ? 4 : 2>();
  for (; pairs > 0; pairs -= kTile, x += kTileDepth) multiply_tiles<kTwo>(x, stride, w.block());
  store_tiles<kTwo>(sums);
}

// The same for R rows by vectors, which read weights faster than tiles do. (Tiles take numbers below the normal ones as zero, and so do the threads that get here.)
template <int R, typename Blocks>
void vectors_of_panel(const uint16_t* x, int64_t stride, Blocks& blocks, int64_t pairs, float* sums) {
  Vec acc[R][2];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
  for (int64_t begin = 0; begin < pairs; begin += kTile) {
    const uint32_t* w = blocks.block();
    Vec even[R][2], odd[R][2];
    for (int r = 0; r < R; ++r) even[r][0] = even[r][1] = odd[r][0] = odd[r][1] = zero();
    for (int64_t i = begin, end = smaller(begin + kTile, pairs); i < end; ++i, w += kPanel) {
      for (int r = 0; r < R; ++r) {
        const __m512i both = _mm512_set1_epi32(read_int(x + r * stride + 2 * i));
        const Vec first = even_of(both), second = odd_of(both);
        for (int v = 0; v < 2; ++v) {
          even[r][v] = fma(first, even_bf16(w + v * kWidth), even[r][v]);
          odd[r][v] = fma(second, odd_bf16(w + v * kWidth), odd[r][v]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < 2; ++v) acc[r][v] = add(acc[r][v], add(even[r][v], odd[r][v]));
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) store(sums + r * kPanel + v * kWidth, acc[r][v]);
}

// Some rows of y from their sums.
INLINE void finish_rows(const Linear& a, const Tile& t, const float* sums) {
  constexpr int kAtOnce = 8;
  const float* b = a.update.b + t.panel * a.update.ranks * kPanel;
  for (int64_t first = 0; first < t.rows; first += kAtOnce, sums += kAtOnce * kPanel) {
    with_rows<kAtOnce>(smaller(t.rows - first, kAtOnce), [&](auto rows) {
      constexpr int R = decltype(rows)::value;
      const float* h = a.update.h + (t.row + first) * a.update.ranks;
      float* y = a.y + (t.row + first) * a.n + t.panel * kPanel;
      Vec acc[R][2];
      for (int r = 0; r < R; ++r) acc[r][0] = load(sums + r * kPanel), acc[r][1] = load(sums + r * kPanel + kWidth);
      for (int64_t i = 0; i < a.update.ranks; ++i) {
        multiply_add(h + i, a.update.ranks, load(b + i * kPanel), load(b + i * kPanel + kWidth), acc);
      }
      for (int r = 0; r < R; ++r) store_columns(y + r * a.n, acc[r], columns_of(a.n, t.panel), a.onto);
    });
  }
}

// A tile of y, its weights from `blocks`.
template <typename Blocks>
INLINE void multiply_panel(const Linear& a, const Tile& t, int64_t pairs, Blocks blocks) {
  const int64_t stride = filled_up(a.k, kRoundedTo);
  const uint16_t* x = static_cast<const uint16_t*>(a.x) + t.row * stride;
  alignas(64) float sums[2 * kTile * kPanel];
  const auto of_panel = t.rows == 1       ? vectors_of_panel<1, Blocks>
                        : t.rows == 2     ? vectors_of_panel<2, Blocks>
                        : t.rows <= kTile ? tiles_of_panel<false, Blocks>
                                          : tiles_of_panel<true, Blocks>;
  of_panel(x, stride, blocks, pairs, sums);
  finish_rows(a, t, sums);
}

// body(tile) for all that items [begin, end) have; a panel lies in so many bytes.
template <typename Body>
INLINE void each_panel(const Linear& a, int64_t pairs, int64_t bytes, int64_t begin, int64_t end, const Body& body) {
  const Tiles tiles(kTile, kTile, kTile);
  each_tile<2 * kTile, kTile>(a.m, a.n, a.w, bytes, pairs, {}, begin, end, body);
}

void linear_bf16(const Linear& a, int64_t begin, int64_t end) {
  const int64_t pairs = (a.k + 1) / 2, values = (a.of_panel + 1) / 2 * kPanel;
  const auto* w = static_cast<const uint32_t*>(a.w);
  each_panel(a, pairs, values * sizeof *w, begin, end,
             [&](const Tile& t) { multiply_panel(a, t, pairs, PlainBlocks(w + t.panel * values, pairs, t)); });
}

// Several tiles of rows have a panel unpacked once, for all of them.
void linear_compact(const Linear& a, int64_t begin, int64_t end) {
  const int64_t pairs = (a.k + 1) / 2, size = compact_size(a.k, kPanel);
  const auto* w = static_cast<const uint16_t*>(a.w);
  const bool several = a.m > 2 * kTile;
  thread_local Memory memory;
  auto* whole = reinterpret_cast<uint32_t*>(memory.reserve(several ? filled_up(pairs, kTile) * kPanel : 0));
  int64_t unpacked = -1;
  each_panel(a, pairs, size * sizeof *w, begin, end, [&](const Tile& t) {
    const uint16_t* of_tile = w + t.panel * size;
    if (!several) return multiply_panel(a, t, pairs, CompactBlocks(of_tile, a.k));
    if (t.panel != unpacked) {
      CompactPanel panel(of_tile, a.k);
      for (int64_t i = 0; i < pairs; i += kTile) panel.unpack(whole + i * kPanel);
      asm volatile("" ::"r"(whole) : "memory");
      unpacked = t.panel;
    }
    multiply_panel(a, t, pairs, PlainBlocks(whole, pairs, t));
  });
}

#else

constexpr auto linear_compact = nullptr;

#endif
