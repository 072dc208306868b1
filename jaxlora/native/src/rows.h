// Rows of x as products take them.
#pragma once

#include "handlers.h"

namespace jaxlora {

// x [m, k], or what is computed of each row of it before: its root-mean-square norm times scale [k], or silu(gate) * up of the gate and up
// that lie side by side in x [m, 2 k].
struct Input {
  const float* x;
  int64_t m, k;
  const float* scale = nullptr;
  float eps = 0;
  bool gated = false;
};

// In which forms rows are wanted. Where `round_rows` is null, rounded ones are plain.
struct Forms {
  bool plain = false, rounded = false, halves = false, quantized = false;
};

// Rows in the forms that were wanted, as `round_rows`, `halve_rows` and `quantize_rows` make them. They are kept until the calling thread
// prepares others.
struct Rows {
  const float* plain = nullptr;  // [m, k]
  const uint16_t* rounded = nullptr;
  const uint32_t* halves = nullptr;
  const void* quantized = nullptr;
  const float* scales = nullptr;  // of halves or of quantized
  const int32_t* offsets = nullptr;
  int64_t rounded_stride = 0;

  // What weights in bfloat16 are multiplied with.
  const void* of_bf16() const { return rounded ? static_cast<const void*>(rounded) : plain; }
};

Rows prepare(const Input& input, Forms forms);

}  // namespace jaxlora
