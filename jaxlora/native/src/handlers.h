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

extern const Kernels* active;  // never null once jaxlora_use has been called

inline int64_t panels(int64_t n) {
  return (n + active->panel - 1) / active->panel;
}

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

}  // namespace jaxlora
