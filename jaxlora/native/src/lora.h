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

// y[0 : N vectors] += sum over ranks of hidden[rank] * b[rank, :].
template <typename T, int N>
INLINE void add_ranks(const float* hidden, const T* b, float* y, int64_t rank, int64_t n) {
  Vec acc[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) acc[i] = load(y + i * kWidth);
  for (int64_t r = 0; r < rank; ++r) {
    Vec value = fill(hidden[r]);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) acc[i] = fma(value, load_value(b + r * n + i * kWidth), acc[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) store(y + i * kWidth, acc[i]);
}

template <typename T>
void lora_up(const Lora& l, int64_t begin, int64_t end) {
  constexpr int kVecs = kWidth == 16 ? 16 : 8;
  for (int64_t i = begin; i < end; ++i) {
    const LoraItem item = l.up[i];
    const LoraGroup group = l.groups[item.group];
    const LoraModule module = l.modules[item.module];
    const T* b = static_cast<const T*>(l.bank) + group.slot * l.size + module.b;
    const int64_t last = item.first + kColumnBlock < module.n ? item.first + kColumnBlock : module.n;
    for (int64_t r = group.begin; r < group.end; ++r) {
      const float* hidden = l.hidden + (item.module * l.m + l.rows[r]) * l.ranks;
      float* y = l.y + l.rows[r] * l.n + module.column;
      int64_t c = item.first;
      for (; c + kVecs * kWidth <= last; c += kVecs * kWidth) add_ranks<T, kVecs>(hidden, b + c, y + c, group.rank, module.n);
      for (; c + 4 * kWidth <= last; c += 4 * kWidth) add_ranks<T, 4>(hidden, b + c, y + c, group.rank, module.n);
      for (; c + kWidth <= last; c += kWidth) add_ranks<T, 1>(hidden, b + c, y + c, group.rank, module.n);
      if (c < last) {
        Vec acc = load_part(y + c, last - c);
        for (int64_t q = 0; q < group.rank; ++q) acc = fma(fill(hidden[q]), load_part(b + q * module.n + c, last - c), acc);
        alignas(64) float lanes[kWidth];
        store(lanes, acc);
        __builtin_memcpy(y + c, lanes, static_cast<size_t>(last - c) * sizeof(float));
      }
    }
  }
}
