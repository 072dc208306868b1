// Low-rank updates, one adapter at a time: its A and B are read once for all of its rows, and only as many ranks as it has.
// Sums over k run in lanes that are added at the end, sums over ranks in ascending order, the same for every row.

INLINE Vec load_part(const float* p, int64_t count) {
  alignas(64) float lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(count) * sizeof(float));
  return load(lanes);
}
INLINE Vec load_part(const uint16_t* p, int64_t count) {
  alignas(64) uint16_t lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(count) * sizeof(uint16_t));
  return load_bf16(lanes);
}

// hidden[i] = x . a[i] for R ranks.
template <typename T, int R>
INLINE void dot_ranks(const float* x, const T* a, float* hidden, int64_t k) {
  Vec acc[R];
  for (int i = 0; i < R; ++i) acc[i] = zero();
  int64_t c = 0;
  for (; c + kWidth <= k; c += kWidth) {
    Vec value = load(x + c);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) acc[i] = fma(value, load_value(a + i * k + c), acc[i]);
  }
  if (c < k) {
    Vec value = load_part(x + c, k - c);
    for (int i = 0; i < R; ++i) acc[i] = fma(value, load_part(a + i * k + c, k - c), acc[i]);
  }
  for (int i = 0; i < R; ++i) hidden[i] = sum(acc[i]);
}

template <typename T>
void lora_down(const Lora& l, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const LoraItem item = l.down[i];
    const LoraGroup group = l.groups[item.group];
    const T* a = static_cast<const T*>(l.bank) + group.slot * l.size + l.modules[item.module].a;
    const int64_t last = item.first + kRankBlock < group.rank ? item.first + kRankBlock : group.rank;
    for (int64_t r = group.begin; r < group.end; ++r) {
      const float* x = l.x + l.rows[r] * l.k;
      float* hidden = l.hidden + (item.module * l.m + l.rows[r]) * l.ranks;
      int64_t rank = item.first;
      for (; rank + 8 <= last; rank += 8) dot_ranks<T, 8>(x, a + rank * l.k, hidden + rank, l.k);
      for (; rank + 4 <= last; rank += 4) dot_ranks<T, 4>(x, a + rank * l.k, hidden + rank, l.k);
      for (; rank < last; ++rank) dot_ranks<T, 1>(x, a + rank * l.k, hidden + rank, l.k);
    }
  }
}

// y[0 : columns] += sum over R ranks of hidden[r] * b[r, 0 : columns]. A block of y stays in the cache while ranks pass over it, and
// every rank is read as one stream.
template <typename T, int R>
INLINE void add_ranks(const float* hidden, const T* b, float* y, int64_t columns, int64_t n) {
  Vec factor[R];
  for (int r = 0; r < R; ++r) factor[r] = fill(hidden[r]);
  int64_t c = 0;
  for (; c + kWidth <= columns; c += kWidth) {
    Vec acc = load(y + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc = fma(factor[r], load_value(b + r * n + c), acc);
    store(y + c, acc);
  }
  if (c < columns) {
    Vec acc = load_part(y + c, columns - c);
    for (int r = 0; r < R; ++r) acc = fma(factor[r], load_part(b + r * n + c, columns - c), acc);
    alignas(64) float lanes[kWidth];
    store(lanes, acc);
    __builtin_memcpy(y + c, lanes, static_cast<size_t>(columns - c) * sizeof(float));
  }
}

template <typename T>
void lora_up(const Lora& l, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const LoraItem item = l.up[i];
    const LoraGroup group = l.groups[item.group];
    const LoraModule module = l.modules[item.module];
    const T* b = static_cast<const T*>(l.bank) + group.slot * l.size + module.b + item.first;
    const int64_t columns = item.first + kColumnBlock < module.n ? kColumnBlock : module.n - item.first;
    for (int64_t r = group.begin; r < group.end; ++r) {
      const float* hidden = l.hidden + (item.module * l.m + l.rows[r]) * l.ranks;
      float* y = l.y + l.rows[r] * l.n + module.column + item.first;
      int64_t rank = 0;
      for (; rank + 8 <= group.rank; rank += 8) add_ranks<T, 8>(hidden + rank, b + rank * module.n, y, columns, module.n);
      for (; rank + 4 <= group.rank; rank += 4) add_ranks<T, 4>(hidden + rank, b + rank * module.n, y, columns, module.n);
      for (; rank < group.rank; ++rank) add_ranks<T, 1>(hidden + rank, b + rank * module.n, y, columns, module.n);
    }
  }
}
