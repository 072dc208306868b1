// What one instruction set offers. Every function works on a range of its items, so that any number of threads may share a call;
// no result depends on how the range was cut, nor on how many rows there are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jaxlora {

// Memory that is read after a product: blocks of kLaterBytes, which begin at so many bytes from a place. While the product of few rows
// computes, memory has time for more than its weights, so each of its items has a share of these fetched.
struct LaterBlock {
  int64_t at, of_start;  // bytes: so many, and so many times `start`
};

struct Later {
  const char* from = nullptr;
  int64_t start = 0;
  const LaterBlock* blocks = nullptr;
  int64_t count = 0;
};

constexpr int64_t kLaterLines = 32, kLaterBytes = kLaterLines * 64;

// y[m, n] = x[m, k] @ w, all float32 but for the weights, which lie in panels of so many columns as the instruction set works on at a time.
//   float32 weights  [panels][k][panel]
//   bfloat16 weights [panels][pairs of k][panel][2], k padded to even with a zero
//   compact bfloat16 weights uint16 [panels][compact_size(k, panel)], a panel being, in bytes,
//     table [16]: upper halves of bfloat16, 0 for places 0 and 8
//     list of (place among the panel's weights [pairs of k][panel][2], bfloat16), uint32 both, of those that have no code, by place, up to a place
//       of all ones; compact_list(k) is where it ends
//     for every 2 of the pairs of k, which zeros fill up to a multiple of kCompactPairs: lower halves [2][2 panel], places in the table [panel / 4][2][8]
//       of 4 bits; a pair's 2 panel weights lie in the order [panel / 8][2][8] of their own [2][panel / 8][8]
// and with h [m, ranks] @ b [panels][ranks][panel] added, where there are ranks. With `onto` all that goes onto what y holds.
struct Update {
  const float *h, *b;
  int64_t ranks;
};

struct Linear {
  const void* x;  // float32 rows, or for bfloat16 weights what `round_rows` made of them
  const void* w;
  float* y;
  int64_t m, k, n;
  bool onto;
  Update update;
  Later later;
  int64_t of_panel;  // values of k that a panel of w holds, of which the first k are read
};

// The same in half precision (halves.h): w is float16 [panels][k][panel], and x what `halve_rows` made of float32 rows.
struct LinearF16 {
  const uint32_t* x;    // [m, k] pairs of one float16 value
  const float* scales;  // [m], what each row of y is multiplied with
  const uint16_t* w;
  float* y;
  int64_t m, k, n;
  bool onto;
};

// The same with weights of 8 bits: for each panel and group of k, a bfloat16 scale for each column, then [quads of k][panel][4] weights, each
// 128 more than its value. x [m, groups, kGroup] of `quantized_bytes` each, scales and offsets [m, groups] are what `quantize_rows` made of
// float32 rows.
struct LinearI8 {
  const void* x;
  const float* scales;
  const int32_t* offsets;
  const uint8_t* w;
  float* y;
  int64_t m, groups, n;
  bool onto;
  Later later;
};

// Values of uint16: what a compact panel's table takes, that with its list, and all of it.
constexpr int64_t kCompactTable = 8, kCompactPairs = 16;
constexpr int64_t compact_list(int64_t k) {
  return (kCompactTable + 4 * (k / 8 + 1) + 31) / 32 * 32;
}
constexpr int64_t compact_size(int64_t k, int64_t panel) {
  return compact_list(k) + (k + 2 * kCompactPairs - 1) / (2 * kCompactPairs) * kCompactPairs * panel * 3 / 2;
}

constexpr int64_t kGroup = 32;  // values of k that share a scale
constexpr int64_t kGroupBytes = kGroup + 2;  // that its weights of one column and their scale take

// The tokens of sequence b are offsets[b] to offsets[b + 1] (the last one's: to `tokens`), of which the first lengths[b] are valid. Its
// token t is at position starts[b] + t of cache slot slots[b].
//   qkv [tokens, heads + 2 kv, d], queries, keys and values as they come out of the products; out [tokens, heads, d];
//   k_cache, v_cache [slots, kv, s, d]; cos, sin [positions, d / 2], by which queries and keys are turned;
//   q_norm, k_norm [d], the scales of their norms, or null
struct Attention {
  const float *qkv, *cos, *sin, *q_norm, *k_norm;
  const int32_t *starts, *lengths, *slots, *offsets;
  void *k_cache, *v_cache;
  float* out;
  int64_t b, tokens, longest, heads, kv, d, s;  // longest: tokens of the longest sequence
  int64_t window;  // 0: none
  float scale, eps;
  int64_t tile;  // tokens of a tile of queries

  // How many tokens a sequence has, valid or not.
  int64_t tokens_of(int64_t sequence) const {
    return (sequence + 1 < b ? offsets[sequence + 1] : tokens) - offsets[sequence];
  }
};

// Whole sequences without a cache. q, out, d_out and dq are [b, t, heads, d]; k, v, dk and dv are [b, t, kv, d]. A token sees those
// before it, of the last `window` (0: all), that have its number in segments [b, t] (null: all). The forward pass writes `out`, the
// gradient reads d_out and writes dq, dk and dv.
struct Causal {
  const float *q, *k, *v, *d_out;
  const int32_t* segments;
  float *out, *dq, *dk, *dv;
  int64_t b, t, heads, kv, d;
  int64_t window;
  float scale;
};

// One module of a LoRA call: y[:, column : column + n] += (x A) B for the rows of each adapter, A [k, rank] and B [rank, n] in panels
// (lora.h). In a bank of int8 float32 scales [rank] follow B, by which x A is multiplied.
struct LoraModule {
  int64_t a, b;       // where they begin in a slot: at so many values for each of the adapter's ranks
  int64_t column, n;  // its columns of y
};

constexpr int64_t kScaleBytes = sizeof(float);

// The rows that share an adapter: entries [begin, end) of Lora::rows. The rank is a multiple of kLoraUnit.
struct LoraGroup {
  int64_t slot, rank, begin, end;
};

// A part of the work, for the rows of one group: the part of k, or kColumnBlock columns, of one module from `first` on.
struct LoraItem {
  int64_t group, module, first;
};

struct Lora {
  const void* x;     // [m, k], float32, or for a bank of bfloat16 what `round_rows` made of that
  const void* bank;  // [adapters, size]
  float* hidden;     // [modules, parts of k, m, hidden_stride]
  float* y;          // [m, n]
  const int64_t* rows;
  const LoraGroup* groups;
  const LoraModule* modules;
  const LoraItem *down, *up;
  int64_t down_count, up_count, start, size, m, k, x_stride, n, part, parts, hidden_stride;  // modules count from `start`; a part has so many values
};

// Rows of logits [m, n] from which tokens [m] are drawn where the temperature is above 0. keys [m, 2] of a generator; top_k 0, top_p 1 and
// min_p 0 leave nothing out.
struct Draw {
  const float *logits, *temperature, *top_p, *min_p;
  const int32_t *top_k, *positions;
  const uint32_t* keys;
  int32_t* tokens;
  int64_t n;
};

// Values of memory that a thread needs for that.
inline int64_t draw_space(int64_t n) {
  return 3 * ((n + 15) / 16 * 16);
}

// Of values by their index: those whose hash is below `limit` are multiplied with `factor`, the others become 0 (jaxlora/native/dropout.py).
struct Dropout {
  uint32_t first, second, limit;
  float factor;
};

// The finalizer of MurmurHash3 (Appleby 2011), of one word or a vector of them. Each instruction set has its own, as of `filled_up`.
template <typename T>
static __attribute__((always_inline)) inline T mixed(T x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// softmax(factor logits) of a row: exp(factor (logits - highest)) / total.
struct SoftmaxRow {
  const float* logits;
  int64_t n;
  float factor, highest, total;
};

struct Kernels {
  const char* name;
  int panel;  // columns of a panel of packed weights
  int rounded_to;  // of how many values rounded rows hold a multiple, filled up with zeros
  bool lora_rounded;  // whether adapters of bfloat16 take rounded rows
  bool fetches_later;  // whether products read `later`
  int quantized_bytes;  // that a value of quantized rows takes
  // Rows of x as bfloat16 weights need them; null where they stay float32.
  void (*round_rows)(const float* x, uint16_t* rounded, int64_t k, int64_t row_begin, int64_t row_end);
  // Items of `linear` are (block of kRowBlock rows, panel), panels fastest.
  void (*linear_f32)(const Linear&, int64_t begin, int64_t end);
  void (*linear_bf16)(const Linear&, int64_t begin, int64_t end);
  void (*linear_compact)(const Linear&, int64_t begin, int64_t end);  // null where the instruction set has none
  // to [end - begin] = what dropout leaves of x, whose values have the indices [begin, end), multiples of 16; or that is added to it.
  void (*drop)(const Dropout&, const float* x, float* to, bool onto, int64_t begin, int64_t end);
  // Of rows, and of a block of kProjectedColumns columns, of what `dropout` leaves of x where it isn't null; the numbers of columns are multiples
  // of 16.
  void (*project_rows)(const float* x, const float* w, float* y, int64_t k, int64_t columns, int64_t begin, int64_t end);
  void (*project_columns)(const float* h, int64_t h_stride, const float* x, const Dropout* dropout, float* y, int64_t m, int64_t ranks, int64_t n,
                          int64_t block);
  // Null where the instruction set lacks arithmetic on float16. Items as of the others.
  void (*halve_rows)(const float* x, uint32_t* halves, float* scales, int64_t k, int64_t row_begin, int64_t row_end);
  void (*linear_f16)(const LinearF16&, int64_t begin, int64_t end);
  void (*quantize_rows)(const float* x, void* values, float* scales, int32_t* offsets, int64_t k, int64_t row_begin, int64_t row_end);
  void (*linear_i8)(const LinearI8&, int64_t begin, int64_t end);
  // Items of `store_new` are (sequence, kv head); of `attend` (sequence, tile, kv head), kv heads fastest.
  void (*store_new_f32)(const Attention&, int64_t begin, int64_t end);
  void (*store_new_bf16)(const Attention&, int64_t begin, int64_t end);
  void (*attend_f32)(const Attention&, int64_t begin, int64_t end);
  void (*attend_bf16)(const Attention&, int64_t begin, int64_t end);
  // Items are (sequence, kv head), kv heads fastest.
  void (*causal)(const Causal&, int64_t begin, int64_t end);
  void (*causal_gradient)(const Causal&, int64_t begin, int64_t end);
  // Items are those of `down` and of `up`.
  void (*lora_down_f32)(const Lora&, int64_t begin, int64_t end);
  void (*lora_down_bf16)(const Lora&, int64_t begin, int64_t end);
  void (*lora_down_i8)(const Lora&, int64_t begin, int64_t end);
  void (*lora_up_f32)(const Lora&, int64_t begin, int64_t end);
  void (*lora_up_bf16)(const Lora&, int64_t begin, int64_t end);
  void (*lora_up_i8)(const Lora&, int64_t begin, int64_t end);
  // Items are rows of logits [m, n].
  void (*summarize)(const float* logits, int32_t* argmax, float* logsumexp, int64_t n, int64_t begin, int64_t end);
  // The logarithm of the probability of `target`; sets the row's `highest` and `total`.
  float (*log_prob)(SoftmaxRow*, int64_t target);
  // to [end - begin]: what it changes by with the logits [begin, end).
  void (*log_prob_slopes)(const SoftmaxRow&, int64_t target, float* to, int64_t begin, int64_t end);
  // Items are rows.
  void (*draw)(const Draw&, float* space, int64_t begin, int64_t end);
  // Items are rows of x [m, n].
  void (*rms_norm)(const float* x, const float* scale, float eps, float* y, int64_t n, int64_t begin, int64_t end);
  void (*rms_norm_gradient)(const float* x, const float* scale, float eps, const float* slope, float* dx, int64_t n, int64_t begin, int64_t end);
  // Items are rows of y [m, n]; those of gate and up [m, n] begin `stride` values after each other.
  void (*swiglu)(const float* gate, const float* up, int64_t stride, float* y, int64_t n, int64_t begin, int64_t end);
  // Items are values.
  void (*swiglu_gradient)(const float* gate, const float* up, const float* slope, float* d_gate, float* d_up, int64_t begin, int64_t end);
};

// n, or the next multiple above it. Not `inline`: each instruction set has its own.
static int64_t filled_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

constexpr int64_t kRowBlock = 128;     // rows of x that are kept in the cache while every panel passes over them
constexpr int64_t kRowsAtOnce = 16;    // rounded rows are read in so many, so that memory up to a multiple has to be there
constexpr int64_t kLoraPanel = 16;     // columns of a panel of A or B
constexpr int64_t kLoraUnit = 8;       // columns of such a panel and ranks are multiples of it
constexpr int64_t kColumnBlock = 320;  // columns of B that one item reads
constexpr int64_t kProjectedColumns = 64;
constexpr int64_t kTileQueries = 48;   // queries (tokens times heads of a group) that share a pass over keys and values
constexpr int64_t kMaxHead = 256;      // largest head dimension

}  // namespace jaxlora
