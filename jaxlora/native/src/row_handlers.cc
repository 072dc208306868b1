// What is computed for each row on its own: handlers that XLA calls.
#include <algorithm>
#include <cstring>

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

ffi::Error draw(F32 logits, F32 temperature, S32 top_k, F32 top_p, F32 min_p, ffi::Buffer<ffi::U32> keys, S32 positions,
                ffi::ResultBuffer<ffi::S32> tokens) {
  const auto shape = logits.dimensions();
  const auto has = [&](size_t count) { return shape.size() == 2 && count == static_cast<size_t>(shape[0]); };
  if (!has(temperature.element_count()) || !has(top_k.element_count()) || !has(top_p.element_count()) || !has(min_p.element_count()) ||
      !has(keys.element_count() / 2) || !has(positions.element_count()) || !has(tokens->element_count()) || shape[1] == 0) {
    return bad("draw takes logits [m, n], settings and positions [m], keys [m, 2]");
  }
  const Draw d{logits.typed_data(), temperature.typed_data(), top_p.typed_data(), min_p.typed_data(), top_k.typed_data(),
               positions.typed_data(), keys.typed_data(), tokens->typed_data(), shape[1]};
  const auto bytes = static_cast<size_t>(draw_space(d.n)) * sizeof(float);
  Pool::instance().split(shape[0], [&](int64_t begin, int64_t end) {
    active->draw(d, static_cast<float*>(scratch.reserve(bytes)), begin, end);
  });
  return ffi::Error::Success();
}

// Rows of a table, widened to float32.
ffi::Error embed(ffi::AnyBuffer table, S32 tokens, F32Result y) {
  const auto shape = table.dimensions(), rows = y->dimensions();
  const bool narrow = table.element_type() == ffi::BF16;
  if (shape.size() != 2 || shape[0] == 0 || rows.size() != 2 || rows[1] != shape[1] || tokens.element_count() != static_cast<size_t>(rows[0]) ||
      !(narrow || table.element_type() == ffi::F32)) {
    return bad("embed takes a table [v, n] and tokens [m]");
  }
  const int64_t n = shape[1];
  for (int64_t row = 0; row < rows[0]; ++row) {
    const int64_t from = std::min<int64_t>(std::max<int64_t>(tokens.typed_data()[row], 0), shape[0] - 1) * n;
    float* to = y->typed_data() + row * n;
    if (!narrow) {
      std::memcpy(to, static_cast<const float*>(table.untyped_data()) + from, n * sizeof(float));
      continue;
    }
    const uint16_t* values = static_cast<const uint16_t*>(table.untyped_data()) + from;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = static_cast<uint32_t>(values[i]) << 16;
      std::memcpy(to + i, &bits, sizeof bits);
    }
  }
  return ffi::Error::Success();
}

ffi::Error rms_norm(F32 x, F32 scale, F32Result y, float eps) {
  const auto shape = x.dimensions();
  if (shape.size() != 2 || scale.element_count() != static_cast<size_t>(shape[1]) || y->element_count() != x.element_count()) {
    return bad("rms_norm takes x [m, n] and scale [n]");
  }
  split_rows(shape[0], shape[1], [&](int64_t begin, int64_t end) {
    active->rms_norm(x.typed_data(), scale.typed_data(), eps, y->typed_data(), shape[1], begin, end);
  });
  return ffi::Error::Success();
}

ffi::Error rms_norm_gradient(F32 x, F32 scale, F32 slope, F32Result dx, float eps) {
  const auto shape = x.dimensions();
  if (shape.size() != 2 || scale.element_count() != static_cast<size_t>(shape[1]) || slope.element_count() != x.element_count() ||
      dx->element_count() != x.element_count()) {
    return bad("rms_norm_gradient takes x and slope [m, n] and scale [n]");
  }
  split_rows(shape[0], shape[1], [&](int64_t begin, int64_t end) {
    active->rms_norm_gradient(x.typed_data(), scale.typed_data(), eps, slope.typed_data(), dx->typed_data(), shape[1], begin, end);
  });
  return ffi::Error::Success();
}

ffi::Error swiglu(F32 gate, F32 up, F32Result y) {
  const auto shape = gate.dimensions();
  if (shape.size() != 2 || up.element_count() != gate.element_count() || y->element_count() != gate.element_count()) {
    return bad("swiglu takes gate and up [m, n]");
  }
  split_rows(shape[0], shape[1], [&](int64_t begin, int64_t end) {
    active->swiglu(gate.typed_data(), up.typed_data(), shape[1], y->typed_data(), shape[1], begin, end);
  });
  return ffi::Error::Success();
}

ffi::Error swiglu_gradient(F32 gate, F32 up, F32 slope, F32Result d_gate, F32Result d_up) {
  const auto shape = gate.dimensions();
  const size_t count = gate.element_count();
  if (shape.size() != 2 || up.element_count() != count || slope.element_count() != count || d_gate->element_count() != count ||
      d_up->element_count() != count) {
    return bad("swiglu_gradient takes gate, up and slope [m, n]");
  }
  split_rows(shape[0], shape[1], [&](int64_t begin, int64_t end) {
    active->swiglu_gradient(gate.typed_data(), up.typed_data(), slope.typed_data(), d_gate->typed_data(), d_up->typed_data(), begin * shape[1],
                            end * shape[1]);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_embed, embed, Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<S32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxlora_rms_norm, rms_norm, Ffi::Bind().Arg<F32>().Arg<F32>().Ret<F32>().Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_rms_norm_gradient, rms_norm_gradient,
                              Ffi::Bind().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_swiglu, swiglu, Ffi::Bind().Arg<F32>().Arg<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_swiglu_gradient, swiglu_gradient, Ffi::Bind().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_summarize, summarize, Ffi::Bind().Arg<F32>().Ret<ffi::Buffer<ffi::S32>>().Ret<F32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_draw, draw,
                              Ffi::Bind()
                                  .Arg<F32>()                    // logits
                                  .Arg<F32>()                    // temperature
                                  .Arg<S32>()                    // top_k
                                  .Arg<F32>()                    // top_p
                                  .Arg<F32>()                    // min_p
                                  .Arg<ffi::Buffer<ffi::U32>>()  // keys
                                  .Arg<S32>()                    // positions
                                  .Ret<ffi::Buffer<ffi::S32>>());

}  // namespace jaxlora
