// What is computed for each row on its own: handlers that XLA calls.
#include "handlers.h"

namespace jaxlora {
namespace {

ffi::Error summarize(F32 logits, ffi::ResultBuffer<ffi::S32> argmax, ffi::ResultBuffer<ffi::F32> logsumexp) {
  const auto shape = logits.dimensions();
  if (shape.size() != 2 || shape[1] == 0 || argmax->element_count() != static_cast<size_t>(shape[0]) ||
      logsumexp->element_count() != argmax->element_count()) {
    return bad("summarize takes logits [m, n]");
  }
  Pool::instance().split(shape[0], [&](int64_t begin, int64_t end) {
    active->summarize(logits.typed_data(), argmax->typed_data(), logsumexp->typed_data(), shape[1], begin, end);
  });
  return ffi::Error::Success();
}

constexpr int64_t kShared = 64;  // rows from which it pays to wake the other threads: a norm of fewer takes microseconds

ffi::Error rms_norm(F32 x, F32 scale, ffi::ResultBuffer<ffi::F32> y, float eps) {
  const auto shape = x.dimensions();
  if (shape.size() != 2 || scale.element_count() != static_cast<size_t>(shape[1]) || y->element_count() != x.element_count()) {
    return bad("rms_norm takes x [m, n] and scale [n]");
  }
  auto rows = [&](int64_t begin, int64_t end) {
    active->rms_norm(x.typed_data(), scale.typed_data(), eps, y->typed_data(), shape[1], begin, end);
  };
  if (shape[0] < kShared) {
    rows(0, shape[0]);
  } else {
    Pool::instance().split(shape[0], rows);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxlora_rms_norm, rms_norm, Ffi::Bind().Arg<F32>().Arg<F32>().Ret<F32>().Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_summarize, summarize, Ffi::Bind().Arg<F32>().Ret<ffi::Buffer<ffi::S32>>().Ret<F32>());

}  // namespace jaxlora
