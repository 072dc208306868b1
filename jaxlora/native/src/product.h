// Products of rows with packed weights of any type.
#pragma once

#include "rows.h"

namespace jaxlora {

// In which form products with weights w take rows.
Forms form_for(const ffi::AnyBuffer& w);

// y [m, n] = rows [m, k] @ w, and `update` added where there is one: for weights in float32 or bfloat16. With `onto` the sum goes onto what y
// holds. An error where w was packed for another shape, or for another instruction set.
ffi::Error multiply(const Rows& rows, const ffi::AnyBuffer& w, float* y, int64_t m, int64_t k, int64_t n, bool onto,
                    const Update& update = {}, const Later& later = {});

// The same for rows [m, count] with values [first, first + count) of k, `first` being a multiple of kGroup: for weights in float32 or bfloat16.
ffi::Error multiply_part(const Rows& rows, const ffi::AnyBuffer& w, float* y, int64_t m, int64_t k, int64_t first, int64_t count, int64_t n,
                         bool onto, const Update& update = {}, const Later& later = {});

}  // namespace jaxlora
