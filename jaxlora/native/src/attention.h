// Causal attention over a cache, with an online softmax over blocks of positions. Blocks lie at whole multiples of kBlock and a
// query meets them in ascending order, so that a token's result does not depend on the tile, the chunk or the batch it came in.
// While a block's keys are used its values are fetched, and while those are used the keys that come next: sequences lie far apart.

constexpr int kValueVecs = kWidth == 16 ? 4 : 2;  // vectors of the head dimension that are summed at once
constexpr int kValueRows = 6;                     // queries that are summed at once
constexpr int kWidenFor = 6;       // queries from which a block of bfloat16 is widened once instead of at every use
constexpr float kMasked = -1e30f;  // finite, so that no infinities are subtracted

// scores[i] = query . key[i] for kWidth positions from `key` on; `last` is the last of them that may be read. D is the head size,
// or 0 where it is only known as `d`.
template <int D, typename Cache>
INLINE Vec dot_keys(const float* query, const Cache* key, int64_t last, int64_t d) {
  const int64_t size = D ? D : d;
  Vec acc[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) acc[i] = zero();
  if (last >= kWidth - 1) {
    for (int64_t c = 0; c < size; c += kWidth) {
      Vec q = load(query + c);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) acc[i] = fma(q, load_value(key + i * size + c), acc[i]);
    }
  } else {
    for (int64_t c = 0; c < size; c += kWidth) {
      Vec q = load(query + c);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) acc[i] = fma(q, load_value(key + (i < last ? i : last) * size + c), acc[i]);
    }
  }
  return sums(acc);
}

// out[r, :] += weights[r, t] * values[t, :] for t in [begin, end), over R queries and N vectors of the head dimension. `ahead`, where
// it is not null, is fetched meanwhile.
template <typename Cache, int R, int N>
INLINE void add_values(const float* weights, const Cache* values, float* out, int64_t begin, int64_t end, int64_t d,
                       const Cache* ahead) {
  Vec acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) acc[r][i] = load(out + r * d + i * kWidth);
  for (int64_t t = begin; t < end; ++t) {
    if (ahead) fetch(ahead + t * d, d);
    Vec value[N];
    for (int i = 0; i < N; ++i) value[i] = load_value(values + t * d + i * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec weight = fill(weights[r * kBlock + t]);
      for (int i = 0; i < N; ++i) acc[r][i] = fma(weight, value[i], acc[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) store(out + r * d + i * kWidth, acc[r][i]);
}

template <typename Cache, int R>
void add_values_of(int rows, const float* weights, const Cache* values, float* out, int64_t begin, int64_t end, int64_t d,
                   const Cache* ahead) {
  if (rows == R) {
    int64_t c = 0;
    for (; c + kValueVecs * kWidth <= d; c += kValueVecs * kWidth, ahead = nullptr) {
      add_values<Cache, R, kValueVecs>(weights, values + c, out + c, begin, end, d, ahead);
    }
    for (; c < d; c += kWidth, ahead = nullptr) add_values<Cache, R, 1>(weights, values + c, out + c, begin, end, d, ahead);
  } else if constexpr (R > 1) {
    add_values_of<Cache, R - 1>(rows, weights, values, out, begin, end, d, ahead);
  }
}

// A query: its vector (scaled, to base 2), the positions it sees, and its softmax so far.
struct Query {
  int64_t low, high;  // both inclusive
  float top;          // largest score
  Vec total;          // sum of weights, by lane
};

// What a tile works in. Apart from the queries on purpose: GCC 12 drops stores where both are members of one object, as it
// derives the address of one from the other's.
struct Workspace {
  alignas(64) float vectors[kTileQueries * kMaxHead];
  alignas(64) float weights[kTileQueries * kBlock];
  alignas(64) float out[kTileQueries * kMaxHead];
  alignas(64) float keys[kBlock * kMaxHead];  // a block of bfloat16 that was widened once for many queries
  alignas(64) float values[kBlock * kMaxHead];
  BlockTiles tiles;
};

template <typename Cache>
class QueryTile {
 public:
  explicit QueryTile(Workspace& w) : vectors_(w.vectors), weights_(w.weights), out_(w.out), keys_(w.keys), values_(w.values), tiles_(w.tiles) {}

  // Where the vector of the query that `push` adds next belongs.
  float* vector(int64_t d) { return vectors_ + count_ * d; }

  void push(float scale, int64_t d, int64_t low, int64_t high) {
    float* q = vector(d);
    Vec factor = fill(scale * kLog2E);
    for (int64_t c = 0; c < d; c += kWidth) {
      store(q + c, mul(load(q + c), factor));
      store(out_ + count_ * d + c, zero());
    }
    queries_[count_++] = {low, high, kMasked, zero()};
  }

  // Keys and values are one head's [s, d]; `after` are the keys of whoever comes next, or null.
  void attend(const Cache* keys, const Cache* values, int64_t s, int64_t d, const Cache* after) {
    int64_t low = queries_[0].low, high = queries_[0].high;
    for (int r = 1; r < count_; ++r) {
      low = queries_[r].low < low ? queries_[r].low : low;
      high = queries_[r].high > high ? queries_[r].high : high;
    }
    const bool tiled = sizeof(Cache) == 2 && BlockTiles::take(d);
    if (tiled) tiles_.begin(vectors_, count_, d);
    for (int64_t block = low / kBlock * kBlock; block <= high; block += kBlock) {
      int64_t end = smaller(high + 1 - block, kBlock), begin = low > block ? low - block : 0;
      const Cache *block_keys = keys + block * d, *block_values = values + block * d;
      const Cache* next = block + kBlock <= high ? block_keys + kBlock * d : after;
      if constexpr (sizeof(Cache) == 2) {
        if (tiled) {
          attend_by_tiles(block_keys, block_values, block, begin, end, s - block, d, next, next ? values + (next - keys) : nullptr);
          continue;
        }
        if (count_ >= kWidenFor) {
          widen(block_keys, keys_, begin * d, end * d);
          widen(block_values, values_, begin * d, end * d);
          attend_block<float>(keys_, values_, block, begin, end, kBlock, d, nullptr);
          continue;
        }
      }
      attend_block(block_keys, block_values, block, begin, end, s - block, d, next);
    }
    if (tiled) tiles_.end();
  }

  void finish(int r, float* out, int64_t d) {
    Vec inverse = fill(1.0f / sum(queries_[r].total));
    for (int64_t c = 0; c < d; c += kWidth) store(out + c, mul(load(out_ + r * d + c), inverse));
  }

 private:
  static void widen(const Cache* from, float* to, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kWidth) store(to + i, load_value(from + i));
  }

  // The positions [begin, end) of one block of keys and values, of which `rows` may be read.
  template <typename T>
  void attend_block(const T* keys, const T* values, int64_t block, int64_t begin, int64_t end, int64_t rows, int64_t d, const T* after) {
    if (d == 64) {
      score<64>(keys, values, block, begin, end, rows, d);
    } else if (d == 128) {
      score<128>(keys, values, block, begin, end, rows, d);
    } else {
      score<0>(keys, values, block, begin, end, rows, d);
    }
    for (int r = 0; r < count_; ++r) weigh(r, block, begin, end, d);
    for (int r = 0; r < count_; r += kValueRows, after = nullptr) {
      int queries = smaller(count_ - r, kValueRows);
      add_values_of<T, kValueRows>(queries, weights_ + r * kBlock, values, out_ + r * d, begin, end, d, after);
    }
  }

  void attend_by_tiles(const Cache* keys, const Cache* values, int64_t block, int64_t begin, int64_t end, int64_t rows, int64_t d,
                       const Cache* next_keys, const Cache* next_values) {
    tiles_.score(keys, values, next_keys, next_values, weights_, count_, begin, end, rows, d);
    for (int r = 0; r < count_; ++r) {
      float* scores = weights_ + r * kBlock;
      for (int64_t g = begin / kWidth * kWidth; g < end; g += kWidth) {
        const int64_t low = queries_[r].low - block - g, high = queries_[r].high - block - g;
        if (low < kWidth && high >= 0) store(scores + g, mask(load(scores + g), low, high));
      }
      weigh(r, block, begin, end, d);
    }
    tiles_.add_values(weights_, out_, count_, begin, end, d);
  }

  // Scores of the lanes [low, high], of which there are some; the others are not seen.
  static INLINE Vec mask(Vec scores, int64_t low, int64_t high) {
    if (high < kWidth - 1) scores = first(static_cast<int>(high) + 1, scores, fill(kMasked));
    if (low > 0) scores = first(static_cast<int>(low), fill(kMasked), scores);
    return scores;
  }

  template <int D, typename T>
  void score(const T* keys, const T* values, int64_t block, int64_t begin, int64_t end, int64_t rows, int64_t d) {
    for (int64_t g = begin / kWidth * kWidth; g < end; g += kWidth) {
      fetch(values + g * d, smaller(end - g, kWidth) * d);
      for (int r = 0; r < count_; ++r) {
        const Query& query = queries_[r];
        int64_t low = query.low - block - g, high = query.high - block - g;  // the lanes that it sees
        Vec scores = fill(kMasked);
        if (low < kWidth && high >= 0) {
          scores = mask(dot_keys<D>(vectors_ + r * d, keys + g * d, rows - 1 - g, d), low, high);
        }
        store(weights_ + r * kBlock + g, scores);
      }
    }
  }

  // Turns one query's scores of the positions [begin, end) of a block into weights, and scales what it has summed so far to the
  // new largest score.
  void weigh(int r, int64_t block, int64_t begin, int64_t end, int64_t d) {
    Query& query = queries_[r];
    float* weights = weights_ + r * kBlock;
    int64_t low = query.low - block, high = query.high - block;
    begin = begin / kWidth * kWidth;
    for (; begin < end && begin + kWidth <= low; begin += kWidth) store(weights + begin, zero());
    for (int64_t g = high < begin ? begin : high / kWidth * kWidth + kWidth; g < end; g += kWidth) store(weights + g, zero());
    if (end > high + 1) end = high + 1;
    if (begin >= end) return;
    Vec top = load(weights + begin);
    for (int64_t g = begin + kWidth; g < end; g += kWidth) top = max(top, load(weights + g));
    float highest = largest(top);
    if (highest > query.top) {
      Vec shrink = exp2(fill(query.top - highest));
      query.top = highest;
      query.total = mul(query.total, shrink);
      for (int64_t c = 0; c < d; c += kWidth) store(out_ + r * d + c, mul(load(out_ + r * d + c), shrink));
    }
    for (int64_t g = begin; g < end; g += kWidth) {
      Vec weight = exp2(sub(load(weights + g), fill(query.top)));
      query.total = add(query.total, weight);
      store(weights + g, weight);
    }
  }

  int count_ = 0;
  Query queries_[kTileQueries];
  float *const vectors_, *const weights_, *const out_, *const keys_, *const values_;
  BlockTiles& tiles_;
};

// A query or key [d] as attention takes it: its norm, where `norm` has scales, turned by its position (Su et al. 2021). The halves of
// a head form the pairs.
INLINE void turn(const Attention& a, const float* x, const float* norm, int64_t position, float* y) {
  alignas(64) float normal[kMaxHead];
  if (norm) {
    normalize(x, norm, a.eps, normal, a.d);
    x = normal;
  }
  const int64_t half = a.d / 2;
  const float *cos = a.cos + position * half, *sin = a.sin + position * half;
  for (int64_t c = 0; c < half; ++c) {
    y[c] = x[c] * cos[c] - x[half + c] * sin[c];
    y[half + c] = x[half + c] * cos[c] + x[c] * sin[c];
  }
}

template <typename Cache>
void attend(const Attention& a, int64_t begin, int64_t end) {
  thread_local Workspace workspace;  // too much for the stack of a thread that is not ours
  const int64_t group = a.heads / a.kv, tiles = (a.longest + a.tile - 1) / a.tile;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t kv = item % a.kv, first_token = item / a.kv % tiles * a.tile, b = item / a.kv / tiles;
    const int64_t offset = a.offsets[b], own = a.tokens_of(b);
    const int64_t after = smaller(first_token + a.tile, own);
    const int64_t valid = smaller(a.lengths[b], after);
    auto head_of = [&](int64_t b, int64_t kv) { return (a.slots[b] * a.kv + kv) * a.s * a.d; };
    const int64_t cache = head_of(b, kv);
    const auto *keys = static_cast<const Cache*>(a.k_cache), *values = static_cast<const Cache*>(a.v_cache);
    const Cache* after_keys = nullptr;
    if (kv + 1 < a.kv) {
      after_keys = keys + head_of(b, kv + 1);
    } else if (tiles == 1 && b + 1 < a.b) {
      after_keys = keys + head_of(b + 1, 0);
    }
    auto at = [&](int64_t token, int64_t head) { return ((offset + token) * a.heads + kv * group + head) * a.d; };
    auto query = [&](int64_t token, int64_t head) {
      return a.qkv + ((offset + token) * (a.heads + 2 * a.kv) + kv * group + head) * a.d;
    };
    const int64_t queries = valid > first_token ? (valid - first_token) * group : 0;
    for (int64_t i = 0; i < queries; i += kTileQueries) {
      const int64_t next = smaller(i + kTileQueries, queries);
      QueryTile<Cache> tile(workspace);
      for (int64_t j = i; j < next; ++j) {
        const int64_t token = first_token + j / group, position = a.starts[b] + token;
        const int64_t low = a.window && position >= a.window ? position - a.window + 1 : 0;
        turn(a, query(token, j % group), a.q_norm, position, tile.vector(a.d));
        tile.push(a.scale, a.d, low, position);
      }
      tile.attend(keys + cache, values + cache, a.s, a.d, next < queries ? nullptr : after_keys);
      for (int64_t j = i; j < next; ++j)
        tile.finish(static_cast<int>(j - i), a.out + at(first_token + j / group, j % group), a.d);
    }
    for (int64_t token = valid > first_token ? valid : first_token; token < after; ++token) {
      __builtin_memset(a.out + at(token, 0), 0, static_cast<size_t>(group * a.d) * sizeof(float));
    }
  }
}

template <typename Cache>
void store_new(const Attention& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t kv = item % a.kv, b = item / a.kv;
    Cache* keys = static_cast<Cache*>(a.k_cache) + ((a.slots[b] * a.kv + kv) * a.s + a.starts[b]) * a.d;
    Cache* values = static_cast<Cache*>(a.v_cache) + ((a.slots[b] * a.kv + kv) * a.s + a.starts[b]) * a.d;
    for (int64_t token = 0; token < a.lengths[b]; ++token) {
      const float* key = a.qkv + ((a.offsets[b] + token) * (a.heads + 2 * a.kv) + a.heads + kv) * a.d;
      const float* value = key + a.kv * a.d;
      alignas(64) float turned[kMaxHead];
      turn(a, key, a.k_norm, a.starts[b] + token, turned);
      for (int64_t c = 0; c < a.d; ++c) store_value(keys + token * a.d + c, turned[c]);
      for (int64_t c = 0; c < a.d; ++c) store_value(values + token * a.d + c, value[c]);
    }
  }
}
