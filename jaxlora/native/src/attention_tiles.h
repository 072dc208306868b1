// The two products of attention over a block of a cache of bfloat16 on CPUs with AMX (see tiles.h): queries by keys, and weights by values.
// A query and a weight go in as the sum of two numbers of bfloat16, the nearest one and what it leaves, so that both keep 16 bits. All
// queries go this way, however many there are: a token's result does not depend on what it came with.

constexpr int64_t kBlock = 128;  // positions: their keys and values stay in the cache while every query of a tile meets them

#ifdef __AMX_BF16__

constexpr int64_t kQueryGroups = kTileQueries / kTile;
static_assert(kTileQueries % kTile == 0);

// to [16, 16] = rows^T, values of 32 bits; its rows are so many values apart.
INLINE void transpose_tile(const Vec (&rows)[16], float* to, int64_t stride) {
  Vec fours[16];  // quarter j of fours[4 g + i]: column 4 j + i of rows 4 g to 4 g + 3
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += 4) {
    const Vec a = _mm512_shuffle_ps(rows[g], rows[g + 1], 0x44), b = _mm512_shuffle_ps(rows[g], rows[g + 1], 0xee);
    const Vec c = _mm512_shuffle_ps(rows[g + 2], rows[g + 3], 0x44), d = _mm512_shuffle_ps(rows[g + 2], rows[g + 3], 0xee);
    fours[g] = _mm512_shuffle_ps(a, c, 0x88), fours[g + 1] = _mm512_shuffle_ps(a, c, 0xdd);
    fours[g + 2] = _mm512_shuffle_ps(b, d, 0x88), fours[g + 3] = _mm512_shuffle_ps(b, d, 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, to += stride) {
    const Vec a = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0x44), b = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0xee);
    const Vec c = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0x44), d = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0xee);
    store(to, _mm512_shuffle_f32x4(a, c, 0x88));
    store(to + 4 * stride, _mm512_shuffle_f32x4(a, c, 0xdd));
    store(to + 8 * stride, _mm512_shuffle_f32x4(b, d, 0x88));
    store(to + 12 * stride, _mm512_shuffle_f32x4(b, d, 0xdd));
  }
}

// The nearest of bfloat16, and the nearest to what it leaves.
INLINE void store_parts(Vec values, uint16_t* nearest, uint16_t* rest) {
  store_rounded(values, nearest);
  store_rounded(sub(values, load_bf16(nearest)), rest);
}

class BlockTiles {
 public:
  // For heads of other sizes there are no tiles.
  static bool take(int64_t d) { return d % kTileDepth == 0; }

  // vectors [queries, d], of which `count` count. The thread's tiles belong to this until `end`.
  void begin(const float* vectors, int count, int64_t d) {
    shape_tiles(kTile, kTile, kTile);
    for (int64_t g = 0; g * kTile < count; ++g) {
      const int64_t queries = smaller(count - g * kTile, kTile);
      for (int64_t c = 0; c < d; c += kTileDepth) {
        Vec parts[2][16];
        for (int i = 0; i < 16; ++i) parts[0][i] = parts[1][i] = zero();
        for (int64_t i = 0; i < queries; ++i) {
          alignas(64) uint16_t halves[2][kTileDepth];
          const float* from = vectors + (g * kTile + i) * d + c;
          for (int64_t half = 0; half < kTileDepth; half += kWidth) store_parts(load(from + half), halves[0] + half, halves[1] + half);
          for (int part = 0; part < 2; ++part) parts[part][i] = _mm512_castsi512_ps(_mm512_loadu_si512(halves[part]));
        }
        for (int part = 0; part < 2; ++part) transpose_tile(parts[part], queries_[part][g] + c / 2 * kTile, kTile);
      }
    }
  }

  void end() { _tile_release(); }

  // scores [count, kBlock] = queries . keys for the positions [begin, end) of a block, of which `rows` may be read; any scores up to the next
  // whole vectors. While tiles multiply, the block's values are laid out for `add_values`, and as many of the next block's keys and values
  // are fetched, where there are any.
  void score(const uint16_t* keys, const uint16_t* values, const uint16_t* next_keys, const uint16_t* next_values, float* scores, int count, int64_t begin, int64_t end, int64_t rows, int64_t d) {
    asm volatile("" ::: "memory");
    for (int64_t at = begin / kTileDepth * kTileDepth; at < end; at += kTileDepth) {
      const uint16_t* from = keys + at * d;
      if (at + kTileDepth > rows) {
        __builtin_memcpy(last_, from, static_cast<size_t>((rows - at) * d) * sizeof *keys);
        asm volatile("" ::: "memory");
        from = last_;
      }
      for (int64_t g = 0; g * kTile < count; ++g) {
        score_tiles(g, from, d);
        if (g == 0) pair_values(values, next_keys, next_values, at, end, d);
        store_sums<2>(sums_, kTile * kTile, kTile);
        const int queries = static_cast<int>(smaller(count - g * kTile, kTile));
        for (int64_t tile = 0; tile < 2; ++tile) {
          Vec by_position[16];
          for (int i = 0; i < 16; ++i) by_position[i] = load(sums_ + (tile * kTile + i) * kTile);
          transpose_tile(by_position, turned_, kTile);
          for (int i = 0; i < queries; ++i) store(scores + (g * kTile + i) * kBlock + at + tile * kTile, load(turned_ + i * kTile));
        }
      }
    }
  }

  // out [count, d] += weights [count, kBlock] @ values for the positions [begin, end) of the block that was scored; weights up to the next
  // whole vectors are zero.
  void add_values(const float* weights, float* out, int count, int64_t begin, int64_t end, int64_t d) {
    const int64_t first = begin / kTileDepth * kTileDepth, filled = filled_up(end, kTileDepth);
    begin = begin / kWidth * kWidth;
    for (int64_t g = 0; g * kTile < count; ++g) {
      const int64_t queries = smaller(count - g * kTile, kTile);
      for (int64_t i = 0; i < queries; ++i) {
        const float* from = weights + (g * kTile + i) * kBlock;
        for (int64_t p = first; p < filled; p += kWidth) {
          store_parts(p >= begin && p < end ? load(from + p) : zero(), parts_[0] + i * kBlock + p, parts_[1] + i * kBlock + p);
        }
      }
      asm volatile("" ::: "memory");
      float* to = out + g * kTile * d;
      int64_t c = 0;
      for (; c + 4 * kTile <= d; c += 4 * kTile) value_tiles<4>(to + c, first, filled, c, d);
      for (; c < d; c += 2 * kTile) value_tiles<2>(to + c, first, filled, c, d);
    }
  }

 private:
  // 32 positions by 16 queries, onto tiles 0 and 1.
  INLINE void score_tiles(int64_t g, const uint16_t* keys, int64_t d) {
    const float *nearest = queries_[0][g], *rest = queries_[1][g];
    zero_sums<2>();
    for (int64_t c = 0; c < d; c += kTileDepth, nearest += kTile * kTile, rest += kTile * kTile) {
      _tile_loadd(6, nearest, 4 * kTile);
      _tile_loadd(4, keys + c, 2 * d);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, keys + kTile * d + c, 2 * d);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(7, rest, 4 * kTile);
      _tile_dpbf16ps(0, 4, 7);
      _tile_dpbf16ps(1, 5, 7);
    }
  }

  // The values of 32 positions from `begin` on, those of two side by side, with zeros behind `end`: nobody knows what lies there.
  INLINE void pair_values(const uint16_t* values, const uint16_t* next_keys, const uint16_t* next_values, int64_t begin, int64_t end, int64_t d) {
    for (int64_t p = begin; p < begin + kTileDepth; p += 2) {
      if (next_keys) fetch(next_keys + p * d, 2 * d), fetch(next_values + p * d, 2 * d);
      for (int64_t c = 0; c < d; c += kWidth) {
        const uint16_t* from = values + p * d + c;
        const __m512i first = _mm512_castps_si512(p < end ? load_bf16(from) : zero()), second = _mm512_castps_si512(p + 1 < end ? load_bf16(from + d) : zero());
        _mm512_storeu_si512(pairs_ + p / 2 * d + c, _mm512_or_si512(_mm512_srli_epi32(first, 16), second));
      }
    }
  }

  // Columns [c, c + 16 N) of 16 rows of out.
  template <int N>
  INLINE void value_tiles(float* out, int64_t begin, int64_t end, int64_t c, int64_t d) {
    load_sums<N>(out, kTile, d);
    for (int64_t p = begin; p < end; p += kTileDepth) {
      const uint32_t* values = pairs_ + p / 2 * d + c;
      _tile_loadd(6, parts_[0] + p, 2 * kBlock);
      _tile_loadd(7, parts_[1] + p, 2 * kBlock);
      _tile_loadd(4, values, 4 * d);
      _tile_dpbf16ps(0, 6, 4);
      _tile_loadd(5, values + kTile, 4 * d);
      _tile_dpbf16ps(1, 6, 5);
      _tile_dpbf16ps(0, 7, 4);
      _tile_dpbf16ps(1, 7, 5);
      if constexpr (N > 2) {
        _tile_loadd(4, values + 2 * kTile, 4 * d);
        _tile_dpbf16ps(2, 6, 4);
        _tile_loadd(5, values + 3 * kTile, 4 * d);
        _tile_dpbf16ps(3, 6, 5);
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
      }
    }
    store_sums<N>(out, kTile, d);
  }

  alignas(64) float queries_[2][kQueryGroups][kMaxHead / 2 * kTile];  // both parts: pairs [d / 2, 16]
  alignas(64) uint16_t parts_[2][kTile * kBlock];                     // of weights [16, kBlock]
  alignas(64) uint32_t pairs_[kBlock / 2 * kMaxHead];                 // of values
  alignas(64) uint16_t last_[2 * kTile * kMaxHead];                   // keys at the end of the cache
  alignas(64) float sums_[2 * kTile * kTile], turned_[kTile * kTile];
};

#else

// There are none.
class BlockTiles {
 public:
  static constexpr bool take(int64_t) { return false; }
  void begin(const float*, int, int64_t) {}
  void end() {}
  void score(const uint16_t*, const uint16_t*, const uint16_t*, const uint16_t*, float*, int, int64_t, int64_t, int64_t, int64_t) {}
  void add_values(const float*, float*, int, int64_t, int64_t, int64_t) {}
};

#endif
