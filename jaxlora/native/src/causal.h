// Causal attention over whole sequences without a cache, and its gradient: what training needs. Query tiles keep the scores of all
// positions that they see, so the softmax is a plain one; the gradient computes it again instead of reading what the forward pass
// would have had to keep. An item is one sequence and key/value head with all its query heads: no two items write to one place.

constexpr int kSteps = 4 * kTileRows;  // queries of a tile

// y[r, :] = sum over i of x[r * row + i * step] * w[i * w_stride, :] for R rows and V vectors of columns; added to y where kAdd.
template <int R, int V, bool kAdd>
INLINE void product_tile(const float* x, int64_t row, int64_t step, const float* w, int64_t w_stride, float* y, int64_t y_stride,
                         int64_t depth) {
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = kAdd ? load(y + r * y_stride + v * kWidth) : zero();
#pragma GCC unroll kUnroll
  for (int64_t i = 0; i < depth; ++i) {
    Vec columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load(w + i * w_stride + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec value = fill(x[r * row + i * step]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(value, columns[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(y + r * y_stride + v * kWidth, acc[r][v]);
}

template <int R, bool kAdd>
void product_rows(int rows, const float* x, int64_t row, int64_t step, const float* w, int64_t w_stride, float* y,
                  int64_t y_stride, int64_t depth, int64_t columns) {
  if (rows == R) {
    int64_t c = 0;
    for (; c + 2 * kWidth <= columns; c += 2 * kWidth) product_tile<R, 2, kAdd>(x, row, step, w + c, w_stride, y + c, y_stride, depth);
    if (c < columns) product_tile<R, 1, kAdd>(x, row, step, w + c, w_stride, y + c, y_stride, depth);
  } else if constexpr (R > 1) {
    product_rows<R - 1, kAdd>(rows, x, row, step, w, w_stride, y, y_stride, depth, columns);
  }
}

// As `product_tile` for any number of rows; `columns` is a multiple of kWidth.
template <bool kAdd>
void product(int64_t rows, const float* x, int64_t row, int64_t step, const float* w, int64_t w_stride, float* y, int64_t y_stride,
             int64_t depth, int64_t columns) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first_row = rows * i / tiles, after = rows * (i + 1) / tiles;
    product_rows<kTileRows, kAdd>(static_cast<int>(after - first_row), x + first_row * row, row, step, w, w_stride,
                                  y + first_row * y_stride, y_stride, depth, columns);
  }
}

// What a thread works in.
struct CausalSpace {
  float *keys, *values;     // [d, width]: transposed, zeros beyond the sequence
  float *shares, *slopes;   // [kSteps, width]
  int64_t width;            // positions, filled up to whole vectors

  CausalSpace(int64_t t, int64_t d) : width((t + 2 * kWidth - 1) / (2 * kWidth) * 2 * kWidth) {
    thread_local Memory memory;
    keys = memory.reserve(2 * (d + kSteps) * width);
    values = keys + d * width;
    shares = values + d * width;
    slopes = shares + kSteps * width;
  }
};

// One sequence and key/value head of a call.
class CausalHead {
 public:
  CausalHead(const Causal& a, int64_t item)
      : a_(a), space_(a.t, a.d), q_row_(a.heads * a.d), kv_row_(a.kv * a.d), group_(a.heads / a.kv) {
    const int64_t b = item / a.kv, head = item % a.kv;
    q_ = b * a.t * q_row_ + head * group_ * a.d;
    kv_ = b * a.t * kv_row_ + head * a.d;
    segments_ = a.segments ? a.segments + b * a.t : nullptr;
  }

  void attend() {
    transpose(a_.k + kv_, space_.keys);
    for_tiles([&](int64_t head) {
      weigh(head);
      product<false>(rows_, space_.shares + low_, space_.width, 1, a_.v + kv_ + low_ * kv_row_, kv_row_, a_.out + at(head), q_row_,
                     seen_ - low_, a_.d);
    });
  }

  void differentiate() {
    transpose(a_.k + kv_, space_.keys);
    transpose(a_.v + kv_, space_.values);
    for (int64_t s = 0; s < a_.t; ++s) {
      __builtin_memset(a_.dk + kv_ + s * kv_row_, 0, static_cast<size_t>(a_.d) * sizeof(float));
      __builtin_memset(a_.dv + kv_ + s * kv_row_, 0, static_cast<size_t>(a_.d) * sizeof(float));
    }
    for_tiles([&](int64_t head) {
      const float *q = a_.q + at(head), *d_out = a_.d_out + at(head);
      const int64_t keys = kv_ + low_ * kv_row_, positions = seen_ - low_;
      const float *shares = space_.shares + low_, *slopes = space_.slopes + low_;
      weigh(head);
      product<true>(positions, shares, 1, space_.width, d_out, q_row_, a_.dv + keys, kv_row_, rows_, a_.d);
      product<false>(rows_, d_out, q_row_, 1, space_.values + low_, space_.width, space_.slopes + low_, space_.width, a_.d, padded_);
      slope();
      product<false>(rows_, slopes, space_.width, 1, a_.k + keys, kv_row_, a_.dq + at(head), q_row_, positions, a_.d);
      product<true>(positions, slopes, 1, space_.width, q, q_row_, a_.dk + keys, kv_row_, rows_, a_.d);
    });
  }

 private:
  // Calls body(query head of the group) for each tile of queries [first_, first_ + rows_), which see positions [low_, seen_).
  template <typename Body>
  void for_tiles(const Body& body) {
    for (first_ = 0; first_ < a_.t; first_ += kSteps) {
      rows_ = smaller(a_.t - first_, kSteps);
      seen_ = first_ + rows_;
      low_ = lowest(first_) / kWidth * kWidth;
      padded_ = (seen_ - low_ + kWidth - 1) / kWidth * kWidth;
      for (int64_t head = 0; head < group_; ++head) body(head);
    }
  }

  int64_t lowest(int64_t token) const { return a_.window && token >= a_.window ? token - a_.window + 1 : 0; }
  int64_t at(int64_t head) const { return q_ + first_ * q_row_ + head * a_.d; }

  void transpose(const float* from, float* to) const {
    for (int64_t s = 0; s < a_.t; ++s)
      for (int64_t c = 0; c < a_.d; ++c) to[c * space_.width + s] = from[s * kv_row_ + c];
    for (int64_t c = 0; c < a_.d; ++c)
      for (int64_t s = a_.t; s < space_.width; ++s) to[c * space_.width + s] = 0;
  }

  // Fills `shares` with the softmax of the tile's scores; 0 for what a query doesn't see.
  void weigh(int64_t head) {
    product<false>(rows_, a_.q + at(head), q_row_, 1, space_.keys + low_, space_.width, space_.shares + low_, space_.width, a_.d, padded_);
    const Vec factor = fill(a_.scale * kLog2E);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t token = first_ + r, low = lowest(token) - low_;
      float* scores = space_.shares + r * space_.width + low_;
      for (int64_t s = 0; s < low; ++s) scores[s] = kMasked;
      for (int64_t s = token + 1 - low_; s < padded_; ++s) scores[s] = kMasked;
      if (segments_) {
        for (int64_t s = low; s <= token - low_; ++s) scores[s] = segments_[low_ + s] == segments_[token] ? scores[s] : kMasked;
      }
      Vec top = load(scores), total = zero();
      for (int64_t s = kWidth; s < padded_; s += kWidth) top = max(top, load(scores + s));
      const Vec highest = fill(largest(top));
      for (int64_t s = 0; s < padded_; s += kWidth) {
        Vec share = exp2(mul(sub(load(scores + s), highest), factor));
        total = add(total, share);
        store(scores + s, share);
      }
      const Vec inverse = fill(1.0f / sum(total));
      for (int64_t s = 0; s < padded_; s += kWidth) store(scores + s, mul(load(scores + s), inverse));
    }
  }

  // Turns the gradients with respect to shares, in `slopes`, into those with respect to query . key.
  void slope() {
    for (int64_t r = 0; r < rows_; ++r) {
      const float* shares = space_.shares + r * space_.width + low_;
      float* slopes = space_.slopes + r * space_.width + low_;
      Vec total = zero();
      for (int64_t s = 0; s < padded_; s += kWidth) total = fma(load(shares + s), load(slopes + s), total);
      const Vec mean = fill(sum(total)), scale = fill(a_.scale);
      for (int64_t s = 0; s < padded_; s += kWidth) {
        store(slopes + s, mul(mul(load(shares + s), scale), sub(load(slopes + s), mean)));
      }
    }
  }

  const Causal& a_;
  const CausalSpace space_;
  const int64_t q_row_, kv_row_, group_;
  int64_t q_, kv_;
  const int32_t* segments_;
  int64_t first_ = 0, rows_ = 0, low_ = 0, seen_ = 0, padded_ = 0;
};

void causal(const Causal& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) CausalHead(a, item).attend();
}

void causal_gradient(const Causal& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) CausalHead(a, item).differentiate();
}
