// Low-rank updates with bfloat16 on CPUs with AMX (see tiles.h): several rows that follow each other go through tiles, one alone through
// vectors, which add in the same order: 32 values of k at a time, the even and the odd ones of these apart.

#ifdef __AMX_BF16__

// One row, whose weights vectors read faster than tiles do.
struct TilePairsLora : RoundedLora {
  template <int kColumns>
  static INLINE void multiply(const X* const (&x)[1], const Weight* w, int64_t steps, const Weight* ahead, Vec (&acc)[1][1]) {
    for (int64_t begin = 0; begin < steps; begin += kTile) {
      Vec even_sum = zero(), odd_sum = zero();
      for (int64_t i = begin, end = smaller(begin + kTile, steps); i < end; ++i, w += kColumns, ahead += kColumns) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
        Vec weights[2];
        load_columns<kColumns>(w, weights);
        const __m512i both = _mm512_set1_epi32(read_int(x[0] + 2 * i));
        even_sum = fma(even_of(both), weights[0], even_sum);
        odd_sum = fma(odd_of(both), weights[1], odd_sum);
      }
      acc[0][0] = add(acc[0][0], add(even_sum, odd_sum));
    }
  }
};

constexpr int64_t kMostTiles = 4;  // of sums

// What some rows of x are multiplied with, and where the products go: x [rows, 2 steps], w [steps][line][2], y [rows, columns], of a panel of
// `line` columns; strides in values.
struct TileProduct {
  const uint16_t* x;
  int64_t x_stride;
  const uint32_t* w;
  int64_t steps, line, columns;
  float* y;
  int64_t y_stride;
  bool onto;
};

// On N tiles of sums: 32 values of k of their rows by those of the panel.
template <int N>
INLINE void multiply_pairs(const uint16_t* x, int64_t stride, const uint32_t* w, int64_t line) {
  _tile_loadd(6, w, 4 * line);
  _tile_loadd(4, x, 2 * stride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (N > 1) {
    _tile_loadd(5, x + kTile * stride, 2 * stride);
    _tile_dpbf16ps(1, 5, 6);
  }
  if constexpr (N > 2) {
    _tile_loadd(4, x + 2 * kTile * stride, 2 * stride);
    _tile_dpbf16ps(2, 4, 6);
  }
  if constexpr (N > 3) {
    _tile_loadd(5, x + 3 * kTile * stride, 2 * stride);
    _tile_dpbf16ps(3, 5, 6);
  }
}

template <int N>
void tile_product(const TileProduct& p) {
  p.onto ? load_sums<N>(p.y, kTile * p.y_stride, p.y_stride) : zero_sums<N>();
  const uint16_t* x = p.x;
  const uint32_t* w = p.w;
  const int64_t at_once = smaller(kTile, p.steps);
  int64_t steps = p.steps;
  for (; steps >= at_once; steps -= at_once, x += 2 * at_once, w += at_once * p.line) multiply_pairs<N>(x, p.x_stride, w, p.line);
  if (steps > 0) {
    alignas(64) uint32_t last[kTile * kLoraPanel] = {};
    __builtin_memcpy(last, w, static_cast<size_t>(steps * p.line) * sizeof(uint32_t));
    asm volatile("" ::"r"(last) : "memory");
    multiply_pairs<N>(x, p.x_stride, last, p.line);
  }
  store_sums<N>(p.y, kTile * p.y_stride, p.y_stride);
}

// So many rows, by whole tiles, of which four share the loads of weights, and then one of fewer rows.
void multiply_rows(Tiles* tiles, TileProduct p, int64_t rows) {
  asm volatile("" ::"r"(p.x), "r"(p.y) : "memory");
  while (rows > 0) {
    const int64_t count = smaller(rows / kTile, kMostTiles), taken = count ? count * kTile : rows;
    tiles->shape(count ? kTile : rows, smaller(kTile, p.steps), p.columns);
    (count == 4 ? tile_product<4> : count == 3 ? tile_product<3> : count == 2 ? tile_product<2> : tile_product<1>)(p);
    p.x += taken * p.x_stride, p.y += taken * p.y_stride;
    rows -= taken;
  }
}

// body(entry of Lora::rows, how many) for the rows of a group in runs that follow each other in x and y.
template <typename Body>
INLINE void each_run(const Lora& l, const LoraGroup& group, Body body) {
  for (int64_t at = group.begin, end; at < group.end; at = end) {
    for (end = at + 1; end < group.end && l.rows[end] == l.rows[end - 1] + 1;) ++end;
    body(at, end - at);
  }
}

void lora_down_bf16(const Lora& l, int64_t begin, int64_t end) {
  Tiles tiles;
  each_item<uint32_t>(l, l.down, l.down_count, true, begin, end, [&](const LoraItem& item, const uint32_t* a, const uint32_t* own, const uint32_t* next) {
    const LoraGroup& group = l.groups[item.group];
    const int64_t count = smaller(l.k - item.first, l.part);
    each_run(l, group, [&](int64_t at, int64_t rows) {
      if (rows == 1) return down_rows<TilePairsLora, 1>(l, item, at, a, at == group.begin ? next : own);
      const uint16_t* x = static_cast<const uint16_t*>(l.x) + l.rows[at] * l.x_stride + item.first;
      float* hidden = hidden_of(l, item.module, item.first / l.part, l.rows[at]);
      for (int64_t r = 0; r < group.rank; r += kLoraPanel) {
        const int64_t columns = smaller(group.rank - r, kLoraPanel);
        const TileProduct p{x, l.x_stride, a + (r * l.k + item.first * columns) / 2, count / 2, columns, columns, hidden + r, l.hidden_stride, false};
        multiply_rows(&tiles, p, rows);
      }
    });
  });
}

void lora_up_bf16(const Lora& l, int64_t begin, int64_t end) {
  Tiles tiles;
  thread_local Memory memory;
  each_item<uint32_t>(l, l.up, l.up_count, false, begin, end, [&](const LoraItem& item, const uint32_t* b, const uint32_t* own, const uint32_t* next) {
    const LoraGroup& group = l.groups[item.group];
    const LoraModule& module = l.modules[item.module];
    const int64_t stride = filled_up(group.rank, kTileDepth), last = smaller(item.first + kColumnBlock, module.n);
    each_run(l, group, [&](int64_t at, int64_t rows) {
      auto* const hidden = reinterpret_cast<uint16_t*>(memory.reserve(rows * stride / 2));
      for (int64_t i = 0; i < rows; ++i) {
        join_parts<TilePairsLora>(l, item, l.rows[at + i], hidden + i * stride);
        for (int64_t r = group.rank; r < stride; ++r) hidden[i * stride + r] = 0;
      }
      if (rows == 1) return up_rows<TilePairsLora, 1>(l, item, at, {hidden}, b, at == group.begin ? next : own);
      float* y = l.y + l.rows[at] * l.n + module.column;
      for (int64_t column = item.first; column < last; column += kLoraPanel) {
        const int64_t columns = smaller(module.n - column, kLoraPanel), line = filled_up(columns, kLoraUnit);
        const TileProduct p{hidden, stride, b + column * group.rank / 2, group.rank / 2, line, columns, y + column, l.n, true};
        multiply_rows(&tiles, p, rows);
      }
    });
  });
}

constexpr bool kLoraRounded = true;

#endif
