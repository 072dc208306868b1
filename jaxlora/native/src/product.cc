#include "product.h"

#include "order.h"

namespace jaxlora {
namespace {

// Shares the panels of w, of `bytes` each, among the threads.
template <typename Body>
void share(const void* w, int64_t bytes, int64_t m, int64_t n, const Body& body, int64_t grain = 1) {
  Order::instance().reading(w, static_cast<size_t>(panels(n) * bytes));
  Pool::instance().split((m + kRowBlock - 1) / kRowBlock * panels(n), body, grain);
}

bool is_packed(const ffi::AnyBuffer& w, int64_t n, int64_t steps, int64_t of_step) {
  const auto ws = w.dimensions();
  return ws.size() == 3 && ws[0] == panels(n) && ws[1] == steps && ws[2] == of_step;
}

ffi::Error other_shape() {
  return bad("the weights were packed for another shape");
}

}  // namespace

Forms form_for(const ffi::AnyBuffer& w) {
  Forms forms;
  switch (w.element_type()) {
    case ffi::U32:
    case ffi::U16: forms.rounded = true; break;
    case ffi::F16: forms.halves = active->halve_rows != nullptr; break;
    case ffi::U8: forms.quantized = true; break;
    default: forms.plain = true;
  }
  return forms;
}

ffi::Error multiply_part(const Rows& rows, const ffi::AnyBuffer& w, float* y, int64_t m, int64_t k, int64_t first, int64_t count, int64_t n,
                         bool onto, const Update& update, const Later& later) {
  const bool narrow = w.element_type() == ffi::U32;
  if (!narrow && w.element_type() != ffi::F32) return bad("only weights packed as float32 or pairs of bfloat16 are read in part");
  if (!is_packed(w, n, narrow ? (k + 1) / 2 : k, active->panel)) return other_shape();
  const int64_t of_k = active->panel * (narrow ? 2 : 4);  // bytes
  const void* part = static_cast<const char*>(w.untyped_data()) + first * of_k;
  const Linear a{narrow ? rows.of_bf16() : rows.plain, part, y, m, count, n, onto, update, later, k};
  const auto linear = narrow ? active->linear_bf16 : active->linear_f32;
  share(part, count * of_k, m, n, [&](int64_t begin, int64_t end) { linear(a, begin, end); });
  return ffi::Error::Success();
}

ffi::Error multiply(const Rows& rows, const ffi::AnyBuffer& w, float* y, int64_t m, int64_t k, int64_t n, bool onto,
                    const Update& update, const Later& later) {
  const int64_t groups = (k + kGroup - 1) / kGroup, panel = active->panel, group_bytes = panel * kGroupBytes;
  switch (w.element_type()) {
    case ffi::F32:
    case ffi::U32: return multiply_part(rows, w, y, m, k, 0, k, n, onto, update, later);
    case ffi::U16: {
      if (!active->linear_compact) return bad(std::string("weights packed in 12 bits can't be read by ") + active->name);
      const int64_t size = compact_size(k, panel);
      if (w.dimensions().size() != 2 || w.dimensions()[0] != panels(n) || w.dimensions()[1] != size) return other_shape();
      const Linear a{rows.of_bf16(), w.untyped_data(), y, m, k, n, onto, update, later, k};
      share(a.w, size * 2, m, n, [&](int64_t begin, int64_t end) { active->linear_compact(a, begin, end); }, 4);
      break;
    }
    case ffi::F16: {
      if (!active->linear_f16) return bad(std::string("weights packed as float16 can't be read by ") + active->name);
      if (!is_packed(w, n, k, panel)) return other_shape();
      const LinearF16 a{rows.halves, rows.scales, static_cast<const uint16_t*>(w.untyped_data()), y, m, k, n, onto};
      share(a.w, panel * k * 2, m, n, [&](int64_t begin, int64_t end) { active->linear_f16(a, begin, end); }, 2);
      break;
    }
    case ffi::U8: {
      if (!is_packed(w, n, groups, group_bytes)) return other_shape();
      const LinearI8 a{rows.quantized, rows.scales, rows.offsets, static_cast<const uint8_t*>(w.untyped_data()), y, m, groups, n, onto, later};
      share(a.w, groups * group_bytes, m, n, [&](int64_t begin, int64_t end) { active->linear_i8(a, begin, end); });
      break;
    }
    default: return bad("weights are packed as float32, float16, pairs of bfloat16, 12 bits or bytes");
  }
  return ffi::Error::Success();
}

}  // namespace jaxlora
