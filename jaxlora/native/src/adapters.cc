// The adapters of the rows of a product.
#include "adapters.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace jaxlora {

bool Adapters::any() const {
  const int32_t* slots = row_slot.typed_data();
  return a_offsets.size() != 0 && std::any_of(slots, slots + row_slot.element_count(), [](int32_t slot) { return slot >= 0; });
}

ffi::Error add_adapters(const Adapters& a, const Rows& from, float* y, int64_t m, int64_t k, int64_t n) {
  const auto bs = a.bank.dimensions();
  if (bs.size() != 2) return bad("adapters lie in a bank [slots, size]");
  const bool bf16 = a.rounded(), int8 = a.bank.element_type() == ffi::S8;
  if (!bf16 && !int8 && a.bank.element_type() != ffi::F32) return bad("the bank is float32, bfloat16 or int8");
  const int64_t slots = bs[0], ranks = a.ranks;
  if (a.row_slot.element_count() != static_cast<size_t>(m)) return bad("row_slot takes one number a row");
  if (a.rank.element_count() != static_cast<size_t>(slots)) return bad("rank takes one number a slot");
  if (a.start.element_count() != 1) return bad("start takes one number");
  const int64_t start = a.start.typed_data()[0];
  const int32_t* row_slot = a.row_slot.typed_data();

  std::vector<LoraModule> modules;
  for (size_t i = 0; i < a.a_offsets.size(); ++i) {
    LoraModule module{start + a.a_offsets[i], start + a.b_offsets[i], a.columns[i], a.widths[i]};
    if (module.a < 0 || module.b < 0 || module.column < 0 || module.a + ranks * k > bs[1] ||
        module.b + ranks * (module.n + (int8 ? kScaleBytes : 0)) > bs[1] || module.column + module.n > n) {
      return bad("module " + std::to_string(i) + " lies outside of the bank or of y");
    }
    modules.push_back(module);
  }

  // Rows in the order of their slots: a count, then their places.
  std::vector<int64_t> place(static_cast<size_t>(slots) + 1), rows(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) {
    int32_t slot = row_slot[i];
    if (slot >= slots)
      return bad("row " + std::to_string(i) + " names slot " + std::to_string(slot) + " of " + std::to_string(slots));
    if (slot >= 0) ++place[static_cast<size_t>(slot) + 1];
  }
  std::vector<LoraGroup> groups;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t begin = place[static_cast<size_t>(slot)], count = place[static_cast<size_t>(slot) + 1];
    const int64_t true_rank = a.rank.typed_data()[slot];
    if (count && true_rank > ranks) return bad("slot " + std::to_string(slot) + " has a rank above the bank's");
    if (count && true_rank > 0) groups.push_back({slot, true_rank, begin, begin + count});
    place[static_cast<size_t>(slot) + 1] += begin;
  }
  for (int64_t i = 0; i < m; ++i) {
    int32_t slot = row_slot[i];
    if (slot >= 0) rows[static_cast<size_t>(place[static_cast<size_t>(slot)]++)] = i;
  }
  if (groups.empty()) return ffi::Error::Success();

  std::vector<LoraItem> down, up;
  for (size_t g = 0; g < groups.size(); ++g) {
    for (size_t i = 0; i < modules.size(); ++i) {
      const auto group = static_cast<int64_t>(g), module = static_cast<int64_t>(i);
      for (int64_t r = 0; r < groups[g].rank; r += kRankBlock) down.push_back({group, module, r});
      for (int64_t c = 0; c < modules[i].n; c += kColumnBlock) up.push_back({group, module, c});
    }
  }
  auto* hidden = scratch.reserve(modules.size() * static_cast<size_t>(m * ranks) * sizeof(float));
  const Lora l{bf16 ? from.of_bf16() : from.plain,
               a.bank.untyped_data(),
               hidden,
               y,
               rows.data(),
               groups.data(),
               modules.data(),
               down.data(),
               up.data(),
               static_cast<int64_t>(down.size()),
               static_cast<int64_t>(up.size()),
               bs[1],
               m,
               k,
               bf16 && from.rounded ? from.rounded_stride : k,
               n,
               ranks};
  const auto lora_down = int8 ? active->lora_down_i8 : bf16 ? active->lora_down_bf16 : active->lora_down_f32;
  const auto lora_up = int8 ? active->lora_up_i8 : bf16 ? active->lora_up_bf16 : active->lora_up_f32;
  Pool& pool = Pool::instance();
  pool.split(l.down_count, [&](int64_t begin, int64_t end) { lora_down(l, begin, end); });
  pool.split(l.up_count, [&](int64_t begin, int64_t end) { lora_up(l, begin, end); });
  return ffi::Error::Success();
}

}  // namespace jaxlora
