// The same products with bfloat16 weights on CPUs with AMX, Intel's Advanced Matrix Extensions (Intel 64 and IA-32 Architectures
// Optimization Reference Manual, chapter 20): registers of 16 rows of 64 bytes, and an instruction that multiplies two of them. A panel of
// packed weights has the form that it takes. A sum runs over k in ascending order, 32 values at a time, whatever the number of rows.

#ifdef __AMX_BF16__

constexpr int64_t kTile = 16;              // rows of a tile, and float32 values in one
constexpr int64_t kTileDepth = 2 * kTile;  // values of k that two tiles multiply
static_assert(kRoundedTo == kTileDepth);
constexpr int64_t kLineBytes = kPanel * 4;  // from a pair of k to the next one in a panel

// Lets this thread use whole tiles while it lives.
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette = 1, rest[15] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 4 * kTile, shapes.rows[i] = kTile;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
};

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

template <bool kTwo>
INLINE void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
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
  asm volatile("" ::: "memory");  // GCC's intrinsics don't say what they write
}

// Products of up to 16 rows, or up to 32, with the panel that has so many pairs of k. Meanwhile what comes next is fetched, as in `tile`.
template <bool kTwo, bool kLater>
void tiles_of_panel(const uint16_t* x, int64_t stride, const uint32_t* w, int64_t pairs, const Tile& t, float* sums) {
  LaterLines lines(t.later, t.next);
  const char* next = t.next;
  zero_tiles<kTwo>();
  for (; pairs >= kTile; pairs -= kTile, x += kTileDepth, w += kTile * kPanel) {
    for (const char* end = next + kTile * t.next_step; next < end; next += 64) _mm_prefetch(next, _MM_HINT_T1);
    for (int i = 0; kLater && i < kTile; ++i) lines.fetch(next);
    multiply_tiles<kTwo>(x, stride, w);
  }
  if (pairs > 0) {
    alignas(64) uint32_t last[kTile * kPanel] = {};
    __builtin_memcpy(last, w, static_cast<size_t>(pairs * kLineBytes));
    asm volatile("" ::"r"(last) : "memory");  // nor what they read
    multiply_tiles<kTwo>(x, stride, last);
  }
  store_tiles<kTwo>(sums);
}

void linear_bf16(const Linear& a, int64_t begin, int64_t end) {
  const int64_t pairs = (a.k + 1) / 2, stride = (a.k + kTileDepth - 1) / kTileDepth * kTileDepth, values = pairs * kPanel;
  const auto* w = static_cast<const uint32_t*>(a.w);
  const auto* x = static_cast<const uint16_t*>(a.x);
  const Tiles tiles;
  alignas(64) float sums[2 * kTile * kPanel];
  each_tile<2 * kTile, kTile>(a.m, a.n, w, values * sizeof *w, pairs, a.later, begin, end, [&](const Tile& t) {
    const bool later = a.later.count;
    (t.rows > kTile ? later ? tiles_of_panel<true, true> : tiles_of_panel<true, false>
     : later        ? tiles_of_panel<false, true>
                    : tiles_of_panel<false, false>)(x + t.row * stride, stride, w + t.panel * values, pairs, t, sums);
    const float* b = a.update.b + t.panel * a.update.ranks * kPanel;
    for (int64_t r = 0; r < t.rows; ++r) {
      Vec acc[1][2] = {{load(sums + r * kPanel), load(sums + r * kPanel + kWidth)}};
      const float* h = a.update.h + (t.row + r) * a.update.ranks;
      for (int64_t i = 0; i < a.update.ranks; ++i) multiply_add(h + i, 0, load(b + i * kPanel), load(b + i * kPanel + kWidth), acc);
      store_columns(a.y + (t.row + r) * a.n + t.panel * kPanel, acc[0], columns_of(a.n, t.panel), a.onto);
    }
  });
}

#endif
