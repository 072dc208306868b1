// The adapters of the rows of a product.
#pragma once

#include <vector>

#include "rows.h"

namespace jaxlora {

using Numbers = ffi::Span<const int64_t>;

// bank [slots, size]; row_slot [m], -1 for none; rank [slots], at most `ranks`, all of them multiples of kLoraUnit. Module i has A and B at
// rank * (start + a_offsets[i]) and rank * (start + b_offsets[i]) of a slot, see `LoraModule`, and widths[i] columns of y from columns[i] on.
struct Adapters {
  ffi::AnyBuffer bank;
  S32 start, row_slot, rank;
  Numbers a_offsets, b_offsets, columns, widths;
  int64_t ranks;
};

// What there is to do for rows in such slots and modules at such offsets. The layers of a step, and steps with the same rows, differ only
// in where offsets count from.
struct AdapterPlan {
  std::vector<int64_t> made_of;
  int64_t end = 0;  // all modules lie before it, in values for each rank
  int64_t part, parts;  // of k
  std::vector<LoraModule> modules;
  std::vector<LoraGroup> groups;
  std::vector<int64_t> rows;
  std::vector<LoraItem> down, up;
  std::vector<LaterBlock> later;  // what is read of the bank, about in that order for each thread: see `Later`
};

// y [m, n] += (x A) B for the rows of each adapter, x [m, k]: the parts of that work.
class AdapterWork {
 public:
  // An error where something lies outside of the bank or of y. The plan is kept until the calling thread reads others.
  ffi::Error read(const Adapters& adapters, int64_t m, int64_t k, int64_t n);

  // Whether no row has an adapter.
  bool empty() const { return !plan_ || plan_->groups.empty(); }

  // Adds the form in which x is read.
  void want(Forms* forms) const { (type_ == ffi::BF16 && active->lora_rounded ? forms->rounded : forms->plain) = true; }

  Later later() const { return {bank_, start_, plan_->later.data(), static_cast<int64_t>(plan_->later.size())}; }

  void run(const Rows& rows, float* y) const;

 private:
  const AdapterPlan* plan_ = nullptr;
  ffi::DataType type_;
  const char* bank_;
  int64_t start_, size_, ranks_, m_, k_, n_;
};

}  // namespace jaxlora
