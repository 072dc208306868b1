#include "rows.h"

namespace jaxlora {
namespace {

// One behind the other in memory, each from a cache line on.
class Layout {
 public:
  size_t add(size_t bytes) {
    const size_t at = size_;
    size_ += (bytes + 63) / 64 * 64;
    return at;
  }
  size_t size() const { return size_; }

 private:
  size_t size_ = 0;
};

thread_local Scratch memory;

}  // namespace

Rows prepare(const Input& input, Forms forms) {
  const int64_t m = input.m, k = input.k, groups = (k + kGroup - 1) / kGroup;
  if (forms.rounded && !active->round_rows) forms.rounded = false, forms.plain = true;
  const bool computed = input.scale || input.gated;
  if (!computed && !forms.rounded && !forms.halves && !forms.quantized) return {input.x};

  const int64_t filled = filled_up(k, active->rounded_to), readable = forms.rounded ? filled_up(m, kRowsAtOnce) : 0;
  const auto count = [m](bool wanted, int64_t of_row, size_t bytes) { return wanted ? static_cast<size_t>(m * of_row) * bytes : 0; };
  Layout layout;
  const size_t plain = layout.add(count(computed, k, sizeof(float)));
  const size_t rounded = layout.add(static_cast<size_t>(readable * filled) * sizeof(uint16_t));
  const size_t halves = layout.add(count(forms.halves, k, sizeof(uint32_t)));
  const size_t quantized = layout.add(count(forms.quantized, groups * kGroup, static_cast<size_t>(active->quantized_bytes)));
  const size_t scales = layout.add(count(forms.halves || forms.quantized, forms.halves ? 1 : groups, sizeof(float)));
  const size_t offsets = layout.add(count(forms.quantized, groups, sizeof(int32_t)));
  char* const base = static_cast<char*>(memory.reserve(layout.size()));

  auto* const computed_rows = reinterpret_cast<float*>(base + plain);
  const float* const x = computed ? computed_rows : input.x;
  auto* const rounded_rows = reinterpret_cast<uint16_t*>(base + rounded);
  auto* const halved = reinterpret_cast<uint32_t*>(base + halves);
  char* const values = base + quantized;
  auto* const of_rows = reinterpret_cast<float*>(base + scales);
  auto* const sums = reinterpret_cast<int32_t*>(base + offsets);
  const auto body = [&](int64_t begin, int64_t end) {
    if (input.scale) active->rms_norm(input.x, input.scale, input.eps, computed_rows, k, begin, end);
    if (input.gated) active->swiglu(input.x, input.x + k, 2 * k, computed_rows, k, begin, end);
    if (forms.rounded) active->round_rows(x, rounded_rows, k, begin, end);
    if (forms.halves) active->halve_rows(x, halved, of_rows, k, begin, end);
    if (forms.quantized) active->quantize_rows(x, values, of_rows, sums, k, begin, end);
  };
  split_rows(m, k * (input.gated ? 2 : 1), body);  // gates take longer than other values
  Rows rows;
  rows.plain = x;
  if (forms.rounded) rows.rounded = rounded_rows, rows.rounded_stride = filled;
  if (forms.halves) rows.halves = halved, rows.scales = of_rows;
  if (forms.quantized) rows.quantized = values, rows.scales = of_rows, rows.offsets = sums;
  return rows;
}

}  // namespace jaxlora
