#include "adapters.h"

#include <algorithm>
#include <array>

namespace jaxlora {
namespace {

constexpr int64_t kPairedPart = 1024, kPartUnit = 32;

// Values of a part of k. Parts come in pairs, so that two threads share A even of a single adapter.
int64_t part_of(int64_t k) {
  const int64_t parts = 2 * ((k + kPairedPart - 1) / kPairedPart);
  return filled_up((k + parts - 1) / parts, kPartUnit);
}

std::vector<LaterBlock> later(const AdapterPlan& plan, int64_t size, int64_t width, int64_t k) {
  std::vector<LaterBlock> a, b, blocks;
  for (const LoraGroup& group : plan.groups) {
    const auto add = [&](int64_t offset, int64_t values, std::vector<LaterBlock>* to) {
      const int64_t at = group.slot * size + group.rank * offset, bytes = group.rank * values * width;
      for (int64_t byte = 0; byte < bytes; byte += kLaterBytes) to->push_back({at * width + byte, group.rank * width});
    };
    for (const LoraModule& module : plan.modules) {
      add(module.a, k, &a);
      add(module.b, module.n, &b);
    }
  }
  const auto threads = static_cast<size_t>(Pool::instance().threads());
  for (size_t i = 0; i < threads; ++i) {
    for (const auto* part : {&a, &b}) {
      blocks.insert(blocks.end(), part->begin() + part->size() * i / threads, part->begin() + part->size() * (i + 1) / threads);
    }
  }
  return blocks;
}

// Fills a plan that has its `made_of`.
ffi::Error make(const Adapters& a, int64_t m, int64_t k, int64_t n, AdapterPlan* plan) {
  const ffi::DataType type = a.bank.element_type();
  if (type != ffi::BF16 && type != ffi::S8 && type != ffi::F32) return bad("the bank is float32, bfloat16 or int8");
  if (type == ffi::BF16 && k % 2) return bad("a bank of bfloat16 takes an even k");
  if (a.ranks % kLoraUnit) return bad("ranks of the bank are multiples of " + std::to_string(kLoraUnit));
  plan->part = part_of(k), plan->parts = (k + plan->part - 1) / plan->part;
  const int64_t slots = a.bank.dimensions()[0];
  for (size_t i = 0; i < a.a_offsets.size(); ++i) {
    const LoraModule module{a.a_offsets[i], a.b_offsets[i], a.columns[i], a.widths[i]};
    if (module.a < 0 || module.b < 0 || module.column < 0 || module.column + module.n > n) {
      return bad("module " + std::to_string(i) + " lies outside of the bank or of y");
    }
    plan->end = std::max({plan->end, module.a + k, module.b + filled_up(module.n, kLoraUnit) + (type == ffi::S8 ? kScaleBytes : 0)});
    plan->modules.push_back(module);
  }

  // Rows in the order of their slots: a count, then their places.
  const int32_t* row_slot = a.row_slot.typed_data();
  std::vector<int64_t> places(static_cast<size_t>(slots) + 1);
  plan->rows.resize(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) {
    const int32_t slot = row_slot[i];
    if (slot >= slots) return bad("row " + std::to_string(i) + " names slot " + std::to_string(slot) + " of " + std::to_string(slots));
    if (slot >= 0) ++places[static_cast<size_t>(slot) + 1];
  }
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t begin = places[static_cast<size_t>(slot)], count = places[static_cast<size_t>(slot) + 1];
    const int64_t rank = a.rank.typed_data()[slot];
    if (count && rank > a.ranks) return bad("slot " + std::to_string(slot) + " has a rank above the bank's");
    if (count && rank % kLoraUnit) return bad("slot " + std::to_string(slot) + " has a rank that is no multiple of " + std::to_string(kLoraUnit));
    if (count && rank > 0) plan->groups.push_back({slot, rank, begin, begin + count});
    places[static_cast<size_t>(slot) + 1] += begin;
  }
  for (int64_t i = 0; i < m; ++i) {
    const int32_t slot = row_slot[i];
    if (slot >= 0) plan->rows[static_cast<size_t>(places[static_cast<size_t>(slot)]++)] = i;
  }

  for (size_t g = 0; g < plan->groups.size(); ++g) {
    for (size_t i = 0; i < plan->modules.size(); ++i) {
      const auto group = static_cast<int64_t>(g), module = static_cast<int64_t>(i);
      for (int64_t first = 0; first < k; first += plan->part) plan->down.push_back({group, module, first});
      for (int64_t first = 0; first < plan->modules[i].n; first += kColumnBlock) plan->up.push_back({group, module, first});
    }
  }
  if (active->fetches_later) plan->later = later(*plan, a.bank.dimensions()[1], static_cast<int64_t>(ffi::ByteWidth(type)), k);
  return ffi::Error::Success();
}

// All that a plan is made of.
void describe(const Adapters& a, int64_t m, int64_t k, int64_t n, std::vector<int64_t>* made_of) {
  const auto bs = a.bank.dimensions();
  *made_of = {m, k, n, a.ranks, bs[0], bs[1], static_cast<int64_t>(a.bank.element_type())};
  for (const Numbers& numbers : {a.a_offsets, a.b_offsets, a.columns, a.widths}) {
    made_of->insert(made_of->end(), numbers.begin(), numbers.end());
  }
  for (const S32& numbers : {a.row_slot, a.rank}) {
    made_of->insert(made_of->end(), numbers.typed_data(), numbers.typed_data() + numbers.element_count());
  }
}

// The plans of one thread: of the last few, so that the kinds of products in a layer have one each.
class Plans {
 public:
  // Sets `plan`.
  ffi::Error find(const Adapters& a, int64_t m, int64_t k, int64_t n, const AdapterPlan** plan) {
    describe(a, m, k, n, &wanted_);
    const auto found = std::find_if(plans_.begin(), plans_.end(), [&](const AdapterPlan& each) { return each.made_of == wanted_; });
    if (found != plans_.end()) {
      *plan = &*found;
      return ffi::Error::Success();
    }
    AdapterPlan made;
    if (auto error = make(a, m, k, n, &made); error.failure()) return error;
    made.made_of = wanted_;
    AdapterPlan& oldest = plans_[next_++ % plans_.size()];
    oldest = std::move(made);
    *plan = &oldest;
    return ffi::Error::Success();
  }

 private:
  std::array<AdapterPlan, 8> plans_;
  std::vector<int64_t> wanted_;
  size_t next_ = 0;
};

thread_local Plans plans;

}  // namespace

ffi::Error AdapterWork::read(const Adapters& a, int64_t m, int64_t k, int64_t n) {
  if (a.a_offsets.size() == 0) return ffi::Error::Success();
  const auto bs = a.bank.dimensions();
  if (bs.size() != 2) return bad("adapters lie in a bank [slots, size]");
  if (a.row_slot.element_count() != static_cast<size_t>(m)) return bad("row_slot takes one number a row");
  if (a.rank.element_count() != static_cast<size_t>(bs[0])) return bad("rank takes one number a slot");
  if (a.start.element_count() != 1) return bad("start takes one number");
  if (auto error = plans.find(a, m, k, n, &plan_); error.failure()) return error;

  start_ = a.start.typed_data()[0];
  if (start_ < 0 || (start_ + plan_->end) * a.ranks > bs[1]) return bad("a module lies outside of the bank");
  type_ = a.bank.element_type(), size_ = bs[1], ranks_ = a.ranks, m_ = m, k_ = k, n_ = n;
  bank_ = static_cast<const char*>(a.bank.untyped_data());
  return ffi::Error::Success();
}

void AdapterWork::run(const Rows& rows, float* y) const {
  const bool bf16 = type_ == ffi::BF16, int8 = type_ == ffi::S8;
  const bool rounded = bf16 && active->lora_rounded;
  const int64_t stride = filled_up(ranks_, kLoraPanel), sums = static_cast<int64_t>(plan_->modules.size()) * plan_->parts * m_ * stride;
  const Lora l{rounded ? static_cast<const void*>(rows.rounded) : rows.plain,
               bank_,
               static_cast<float*>(scratch.reserve(static_cast<size_t>(sums) * sizeof(float))),
               y,
               plan_->rows.data(),
               plan_->groups.data(),
               plan_->modules.data(),
               plan_->down.data(),
               plan_->up.data(),
               static_cast<int64_t>(plan_->down.size()),
               static_cast<int64_t>(plan_->up.size()),
               start_,
               size_,
               m_,
               k_,
               rounded ? rows.rounded_stride : k_,
               n_,
               plan_->part,
               plan_->parts,
               stride};
  const auto lora_down = int8 ? active->lora_down_i8 : bf16 ? active->lora_down_bf16 : active->lora_down_f32;
  const auto lora_up = int8 ? active->lora_up_i8 : bf16 ? active->lora_up_bf16 : active->lora_up_f32;
  Pool& pool = Pool::instance();
  pool.split(l.down_count, [&](int64_t begin, int64_t end) { lora_down(l, begin, end); });
  pool.split(l.up_count, [&](int64_t begin, int64_t end) { lora_up(l, begin, end); });
}

}  // namespace jaxlora
