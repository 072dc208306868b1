#include "adapters.h"

#include <algorithm>

namespace jaxlora {
namespace {

// Of that many bytes.
void add_blocks(const char* from, int64_t bytes, std::vector<const char*>* blocks) {
  for (int64_t at = 0; at < bytes; at += kLaterBytes) blocks->push_back(from + at);
}

}  // namespace

ffi::Error AdapterWork::read(const Adapters& a, int64_t m, int64_t k, int64_t n) {
  modules_.clear(), groups_.clear(), down_.clear(), up_.clear();
  if (a.a_offsets.size() == 0) return ffi::Error::Success();

  const auto bs = a.bank.dimensions();
  if (bs.size() != 2) return bad("adapters lie in a bank [slots, size]");
  type_ = a.bank.element_type(), bank_ = static_cast<const char*>(a.bank.untyped_data()), size_ = bs[1], ranks_ = a.ranks;
  m_ = m, k_ = k, n_ = n;
  if (type_ != ffi::BF16 && type_ != ffi::S8 && type_ != ffi::F32) return bad("the bank is float32, bfloat16 or int8");
  const int64_t slots = bs[0];
  if (a.row_slot.element_count() != static_cast<size_t>(m)) return bad("row_slot takes one number a row");
  if (a.rank.element_count() != static_cast<size_t>(slots)) return bad("rank takes one number a slot");
  if (a.start.element_count() != 1) return bad("start takes one number");

  const int64_t start = a.start.typed_data()[0];
  for (size_t i = 0; i < a.a_offsets.size(); ++i) {
    const LoraModule module{start + a.a_offsets[i], start + a.b_offsets[i], a.columns[i], a.widths[i]};
    if (module.a < 0 || module.b < 0 || module.column < 0 || module.a + ranks_ * k > size_ ||
        module.b + ranks_ * (module.n + (type_ == ffi::S8 ? kScaleBytes : 0)) > size_ || module.column + module.n > n) {
      return bad("module " + std::to_string(i) + " lies outside of the bank or of y");
    }
    modules_.push_back(module);
  }

  const int32_t* row_slot = a.row_slot.typed_data();
  if (std::none_of(row_slot, row_slot + m, [](int32_t slot) { return slot >= 0; })) return ffi::Error::Success();

  // Rows in the order of their slots: a count, then their places.
  places_.assign(static_cast<size_t>(slots) + 1, 0);
  rows_.resize(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) {
    const int32_t slot = row_slot[i];
    if (slot >= slots) return bad("row " + std::to_string(i) + " names slot " + std::to_string(slot) + " of " + std::to_string(slots));
    if (slot >= 0) ++places_[static_cast<size_t>(slot) + 1];
  }
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t begin = places_[static_cast<size_t>(slot)], count = places_[static_cast<size_t>(slot) + 1];
    const int64_t rank = a.rank.typed_data()[slot];
    if (count && rank > ranks_) return bad("slot " + std::to_string(slot) + " has a rank above the bank's");
    if (count && rank > 0) groups_.push_back({slot, rank, begin, begin + count});
    places_[static_cast<size_t>(slot) + 1] += begin;
  }
  for (int64_t i = 0; i < m; ++i) {
    const int32_t slot = row_slot[i];
    if (slot >= 0) rows_[static_cast<size_t>(places_[static_cast<size_t>(slot)]++)] = i;
  }

  for (size_t g = 0; g < groups_.size(); ++g) {
    for (size_t i = 0; i < modules_.size(); ++i) {
      const auto group = static_cast<int64_t>(g), module = static_cast<int64_t>(i);
      for (int64_t r = 0; r < groups_[g].rank; r += kRankBlock) down_.push_back({group, module, r});
      for (int64_t c = 0; c < modules_[i].n; c += kColumnBlock) up_.push_back({group, module, c});
    }
  }
  return ffi::Error::Success();
}

Later AdapterWork::later() {
  a_.clear(), b_.clear(), blocks_.clear();
  const auto width = static_cast<int64_t>(ffi::ByteWidth(type_));
  for (const LoraGroup& group : groups_) {
    for (const LoraModule& module : modules_) {
      const char* slot = bank_ + group.slot * size_ * width;
      add_blocks(slot + module.a * width, group.rank * k_ * width, &a_);
      add_blocks(slot + module.b * width, group.rank * module.n * width, &b_);
    }
  }
  const auto threads = static_cast<size_t>(Pool::instance().threads());
  for (size_t i = 0; i < threads; ++i) {
    for (const auto* part : {&a_, &b_}) {
      blocks_.insert(blocks_.end(), part->begin() + part->size() * i / threads, part->begin() + part->size() * (i + 1) / threads);
    }
  }
  return {blocks_.data(), static_cast<int64_t>(blocks_.size())};
}

void AdapterWork::run(const Rows& rows, float* y) {
  const bool bf16 = type_ == ffi::BF16, int8 = type_ == ffi::S8;
  const Lora l{bf16 ? rows.of_bf16() : rows.plain,
               bank_,
               scratch.reserve(modules_.size() * static_cast<size_t>(m_ * ranks_) * sizeof(float)),
               y,
               rows_.data(),
               groups_.data(),
               modules_.data(),
               down_.data(),
               up_.data(),
               static_cast<int64_t>(down_.size()),
               static_cast<int64_t>(up_.size()),
               size_,
               m_,
               k_,
               bf16 && rows.rounded ? rows.rounded_stride : k_,
               n_,
               ranks_};
  const auto lora_down = int8 ? active->lora_down_i8 : bf16 ? active->lora_down_bf16 : active->lora_down_f32;
  const auto lora_up = int8 ? active->lora_up_i8 : bf16 ? active->lora_up_bf16 : active->lora_up_f32;
  Pool& pool = Pool::instance();
  pool.split(l.down_count, [&](int64_t begin, int64_t end) { lora_down(l, begin, end); });
  pool.split(l.up_count, [&](int64_t begin, int64_t end) { lora_up(l, begin, end); });
}

}  // namespace jaxlora
