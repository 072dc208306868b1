// What the handlers share: types, errors, scratch memory, and the instruction set in use.
#pragma once

#include <cstdlib>
#include <string>

#include "kernels.h"
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace jaxlora {

namespace ffi = xla::ffi;
using xla::ffi::Ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using F32Result = ffi::ResultBuffer<ffi::F32>;

extern const Kernels* active;  // never null once jaxlora_select has named a set

inline ffi::Error bad(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "jaxlora native: " + message);
}

// Memory that a calling thread keeps from one call to the next.
class Scratch {
 public:
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, size_);
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline thread_local Scratch scratch;

constexpr int64_t kSerial = 1 << 14;  // values below which waking a worker costs more than it saves

// What happens to each row of x before a product.
template <typename Body>
void prepare_rows(int64_t m, int64_t k, const Body& body) {
  if (m * k < kSerial) {
    body(0, m);
  } else {
    Pool::instance().split(m, body, 16);
  }
}

// Values from a row of x to the next one, as products with weights in bfloat16 (or not) take them.
inline int64_t row_stride(bool bf16, int64_t k) {
  return bf16 && active->round_rows ? (k + 1) / 2 * 2 : k;
}

// Bytes that `rows_for` needs.
inline size_t rows_space(bool bf16, int64_t m, int64_t k) {
  return bf16 && active->round_rows ? static_cast<size_t>(m * row_stride(bf16, k)) * sizeof(uint16_t) : 0;
}

// Rows of x as those products take them: rounded, in `space`, or as they are.
inline const void* rows_for(bool bf16, const float* x, int64_t m, int64_t k, void* space) {
  if (!bf16 || !active->round_rows) return x;
  auto* rounded = static_cast<uint16_t*>(space);
  prepare_rows(m, k, [&](int64_t begin, int64_t end) {
    active->round_rows(x, rounded, k, begin, end);
  });
  return rounded;
}

}  // namespace jaxlora
