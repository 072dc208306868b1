// The adapters of the rows of a product.
#pragma once

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

  // Whether any row has one.
  bool any() const;
  // The form in which the bank's products take rows.
  bool rounded() const { return bank.element_type() == ffi::BF16; }
};

// y [m, n] += (x A^T) B for the rows of each adapter.
ffi::Error add_adapters(const Adapters& adapters, const Rows& rows, float* y, int64_t m, int64_t k, int64_t n);

}  // namespace jaxlora
