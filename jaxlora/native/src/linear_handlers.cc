// A linear layer with what comes before and after it: a handler that XLA calls.
#include <algorithm>
#include <cstring>

#include "adapters.h"
#include "product.h"

namespace jaxlora {
namespace {

// y = f(x) @ w, where f is nothing, the norm times `scale`, or the gate (see `Input`); on top of `onto`, which y takes the place of; and with
// the adapters of the rows. Of so many rows as `live` says: the others stay as they are in `onto`, or are zeros where `cleared`, or hold
// anything. What there is not comes as arrays without values.
ffi::Error linear(F32 x, ffi::AnyBuffer w, F32 scale, F32 onto, ffi::AnyBuffer bank, S32 start, S32 row_slot, S32 rank, S32 live, F32Result y,
                  float eps, bool gated, bool cleared, Numbers a_offsets, Numbers b_offsets, Numbers columns, Numbers widths, int64_t ranks) {
  const auto xs = x.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ys.size() != 2 || xs[0] != ys[0]) return bad("linear takes x [m, k], packed w and y [m, n]");
  const int64_t all = xs[0], m = live.element_count() ? live.typed_data()[0] : all, k = gated ? xs[1] / 2 : xs[1], n = ys[1];
  const bool normed = scale.element_count() != 0, added = onto.element_count() != 0;
  if (gated && xs[1] % 2) return bad("a gate takes x [m, 2 k]");
  if (normed && (gated || scale.element_count() != static_cast<size_t>(k))) return bad("a norm takes x [m, k] and scale [k]");
  if (added && onto.typed_data() != y->typed_data()) return bad("the sum does not take the place of what is added to");

  if (m < 0 || m > all) return bad("more rows are live than there are");

  AdapterWork work;
  if (auto error = work.read({bank, start, row_slot, rank, a_offsets, b_offsets, columns, widths, ranks}, all, k, n); error.failure()) {
    return error;
  }
  if (!work.empty() && std::any_of(row_slot.typed_data() + m, row_slot.typed_data() + all, [](int32_t slot) { return slot >= 0; })) {
    return bad("a row that is not live has an adapter");
  }
  if (cleared && !added && m < all) {
    Pool::instance().split(all - m, [&](int64_t begin, int64_t end) {
      std::memset(y->typed_data() + (m + begin) * n, 0, static_cast<size_t>((end - begin) * n) * sizeof(float));
    });
  }
  Forms forms = form_for(w);
  if (!work.empty()) work.want(&forms);
  const Rows rows = prepare({x.typed_data(), m, k, normed ? scale.typed_data() : nullptr, eps, gated}, forms);
  const Later later = work.empty() ? Later{} : work.later();
  if (auto error = multiply(rows, w, y->typed_data(), m, k, n, added, {}, later); error.failure()) return error;
  if (!work.empty()) work.run(rows, y->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_linear, linear,
                              Ffi::Bind()
                                  .Arg<F32>()             // x
                                  .Arg<ffi::AnyBuffer>()  // w
                                  .Arg<F32>()             // scale
                                  .Arg<F32>()             // onto
                                  .Arg<ffi::AnyBuffer>()  // bank
                                  .Arg<S32>()             // start
                                  .Arg<S32>()             // row_slot
                                  .Arg<S32>()             // rank
                                  .Arg<S32>()             // live
                                  .Ret<F32>()             // y
                                  .Attr<float>("eps")
                                  .Attr<bool>("gated")
                                  .Attr<bool>("cleared")
                                  .Attr<Numbers>("a_offsets")
                                  .Attr<Numbers>("b_offsets")
                                  .Attr<Numbers>("columns")
                                  .Attr<Numbers>("widths")
                                  .Attr<int64_t>("ranks"));

}  // namespace jaxlora
