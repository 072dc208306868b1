// The adapters of the rows of a product.
#pragma once

#include <vector>

#include "rows.h"

namespace jaxlora {

using Numbers = ffi::Span<const int64_t>;

// bank [slots, size]; start, from which offsets count in each slot; row_slot [m], -1 for none; rank [slots], at most `ranks`. Module i has
// A [ranks, k] at a_offsets[i], B [ranks, widths[i]] at b_offsets[i] and the columns of y from columns[i] on.
struct Adapters {
  ffi::AnyBuffer bank;
  S32 start, row_slot, rank;
  Numbers a_offsets, b_offsets, columns, widths;
  int64_t ranks;
};

// y [m, n] += (x A^T) B for the rows of each adapter, x [m, k]: the parts of that work.
class AdapterWork {
 public:
  // An error where something lies outside of the bank or of y.
  ffi::Error read(const Adapters& adapters, int64_t m, int64_t k, int64_t n);

  // Whether no row has an adapter.
  bool empty() const { return groups_.empty(); }

  // Adds the form in which x is read.
  void want(Forms* forms) const { (type_ == ffi::BF16 ? forms->rounded : forms->plain) = true; }

  // What it reads of the bank, about in that order for each thread.
  Later later();

  void run(const Rows& rows, float* y);

 private:
  std::vector<LoraModule> modules_;
  std::vector<LoraGroup> groups_;
  std::vector<LoraItem> down_, up_;
  std::vector<int64_t> places_, rows_;
  std::vector<const char*> a_, b_, blocks_;
  ffi::DataType type_;
  const char* bank_;
  int64_t size_, ranks_, m_, k_, n_;
};

}  // namespace jaxlora
