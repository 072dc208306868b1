// Low-rank updates, one adapter at a time: its A and B are read once for all of its rows, and only as many ranks as it has.
// Sums over k run in lanes that are added at the end, sums over ranks in ascending order, the same for every row.
//
// Adapters lie far apart in the bank and each is read in short stretches, so that the hardware's prefetching starts over all the
// time: every item fetches the next one's weights before it computes.

template <typename T>
INLINE void fetch(const T* p, int64_t count) {
  for (const char *at = reinterpret_cast<const char*>(p), *end = reinterpret_cast<const char*>(p + count); at < end; at += 64) {
    _mm_prefetch(at, _MM_HINT_T0);
  }
}

// hidden[row][i] = x[row] . a[i] for M rows and R ranks.
template <int M, int R, typename T>
INLINE void dot_ranks(const float* const* x, const T* a, float* const* hidden, int64_t rank, int64_t k) {
  Vec acc[M][R];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < R; ++i) acc[m][i] = zero();
  a += rank * k;
  int64_t c = 0;
  for (; c + kWidth <= k; c += kWidth) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      Vec weight = load_value(a + i * k + c);
      for (int m = 0; m < M; ++m) acc[m][i] = fma(load(x[m] + c), weight, acc[m][i]);
    }
  }
  if (c < k) {
    for (int i = 0; i < R; ++i) {
      Vec weight = load_part(a + i * k + c, k - c);
      for (int m = 0; m < M; ++m) acc[m][i] = fma(load_part(x[m] + c, k - c), weight, acc[m][i]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < R; ++i) hidden[m][rank + i] = sum(acc[m][i]);
}

// y[row][0 : columns] += sum over R ranks of hidden[row][r] * b[r, 0 : columns]. A block of y stays in the cache while ranks pass
// over it, and every rank is read as one stream.
template <int M, int R, typename T>
INLINE void add_ranks(const float* const* hidden, const T* b, float* const* y, int64_t rank, int64_t columns, int64_t n) {
  b += rank * n;
  int64_t c = 0;
  for (; c + kWidth <= columns; c += kWidth) {
    Vec weight[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weight[r] = load_value(b + r * n + c);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      Vec acc = load(y[m] + c);
      for (int r = 0; r < R; ++r) acc = fma(fill(hidden[m][rank + r]), weight[r], acc);
      store(y[m] + c, acc);
    }
  }
  if (c < columns) {
    for (int m = 0; m < M; ++m) {
      Vec acc = load_part(y[m] + c, columns - c);
      for (int r = 0; r < R; ++r) acc = fma(fill(hidden[m][rank + r]), load_part(b + r * n + c, columns - c), acc);
      alignas(64) float lanes[kWidth];
      store(lanes, acc);
      __builtin_memcpy(y[m] + c, lanes, static_cast<size_t>(columns - c) * sizeof(float));
    }
  }
}

// The ranks of A, or the columns of B, that an item reads.
template <typename T>
struct LoraPart {
  LoraPart(const Lora& l, const LoraItem& item, bool down)
      : group(l.groups[item.group]),
        module(l.modules[item.module]),
        weights(static_cast<const T*>(l.bank) + group.slot * l.size +
                (down ? module.a + item.first * l.k : module.b + item.first)),
        count((down ? group.rank : module.n) - item.first) {
    const int64_t most = down ? kRankBlock : kColumnBlock;
    if (count > most) count = most;
  }
  const LoraGroup& group;
  const LoraModule& module;
  const T* weights;
  int64_t count;
};

template <int M, typename T>
INLINE void down_rows(const Lora& l, const LoraItem& item, const LoraPart<T>& part, int64_t row) {
  const float* x[M];
  float* hidden[M];
  for (int m = 0; m < M; ++m) {
    x[m] = l.x + l.rows[row + m] * l.k;
    hidden[m] = l.hidden + (item.module * l.m + l.rows[row + m]) * l.ranks + item.first;
  }
  int64_t rank = 0;
  for (; rank + 4 <= part.count; rank += 4) dot_ranks<M, 4>(x, part.weights, hidden, rank, l.k);
  for (; rank < part.count; ++rank) dot_ranks<M, 1>(x, part.weights, hidden, rank, l.k);
}

template <typename T>
void lora_down(const Lora& l, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const LoraPart<T> part(l, l.down[i], true);
    if (i + 1 < l.down_count) {
      const LoraPart<T> next(l, l.down[i + 1], true);
      fetch(next.weights, next.count * l.k);
    }
    int64_t row = part.group.begin;
    for (; row + 4 <= part.group.end; row += 4) down_rows<4>(l, l.down[i], part, row);
    for (; row < part.group.end; ++row) down_rows<1>(l, l.down[i], part, row);
  }
}

template <int M, typename T>
INLINE void up_rows(const Lora& l, const LoraItem& item, const LoraPart<T>& part, int64_t row) {
  const float* hidden[M];
  float* y[M];
  for (int m = 0; m < M; ++m) {
    hidden[m] = l.hidden + (item.module * l.m + l.rows[row + m]) * l.ranks;
    y[m] = l.y + l.rows[row + m] * l.n + part.module.column + item.first;
  }
  const int64_t n = part.module.n, ranks = part.group.rank;
  int64_t rank = 0;
  for (; rank + 8 <= ranks; rank += 8) add_ranks<M, 8>(hidden, part.weights, y, rank, part.count, n);
  for (; rank < ranks; ++rank) add_ranks<M, 1>(hidden, part.weights, y, rank, part.count, n);
}

template <typename T>
void lora_up(const Lora& l, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const LoraPart<T> part(l, l.up[i], false);
    if (i + 1 < l.up_count) {
      const LoraPart<T> next(l, l.up[i + 1], false);
      for (int64_t rank = 0; rank < next.group.rank; ++rank) fetch(next.weights + rank * next.module.n, next.count);
    }
    int64_t row = part.group.begin;
    for (; row + 4 <= part.group.end; row += 4) up_rows<4>(l, l.up[i], part, row);
    for (; row < part.group.end; ++row) up_rows<1>(l, l.up[i], part, row);
  }
}
