// The log-probabilities of given tokens under a frozen output layer, and their slopes: a handler that XLA calls.
#include <algorithm>
#include <cstring>
#include <vector>

#include "product.h"

namespace jaxlora {
namespace {

constexpr int64_t kTokens = kRowBlock;  // whose logits are in memory at a time
constexpr int64_t kPart = 2048;         // logits whose slopes are multiplied at a time: those of a block of tokens stay in a cache

// found [m] = log_softmax((x @ w + bias) * factor) at the targets [m], 0 where a target is negative; and, where `slopes` [m, k] has values, the
// gradient of each with respect to its row of x. w [k, n] is packed as it is and transposed; without values there is no bias.
ffi::Error log_probs(F32 x, ffi::AnyBuffer w, ffi::AnyBuffer transposed, F32 bias, S32 targets, F32 factor, F32Result found, F32Result slopes,
                     int64_t n) {
  const auto xs = x.dimensions();
  const auto values = [&](const auto& array) { return static_cast<int64_t>(array.element_count()); };
  if (xs.size() != 2 || values(targets) != xs[0] || values(*found) != xs[0] || values(factor) != 1) return bad("log_probs takes x [m, k] and targets [m]");
  const int64_t m = xs[0], k = xs[1];
  const bool sloped = values(*slopes) != 0;
  if ((sloped && values(*slopes) != m * k) || (values(bias) && values(bias) != n)) return bad("slopes are [m, k], a bias is [n]");

  std::fill_n(found->typed_data(), m, 0.0f);
  if (sloped) std::fill_n(slopes->typed_data(), m * k, 0.0f);
  std::vector<int64_t> wanted;
  for (int64_t row = 0; row < m; ++row) {
    if (targets.typed_data()[row] >= n) return bad("a target lies outside of the output layer");
    if (targets.typed_data()[row] >= 0) wanted.push_back(row);
  }
  const int64_t room = std::min<int64_t>(kTokens, static_cast<int64_t>(wanted.size()));
  auto* const logits = static_cast<float*>(scratch.reserve(static_cast<size_t>(room * (n + kPart + 2 * k)) * sizeof(float)));
  float *const part = logits + room * n, *const rows = part + room * kPart, *const along = rows + room * k;
  SoftmaxRow softmax[kTokens];
  const float times = factor.typed_data()[0];

  for (size_t done = 0; done < wanted.size(); done += kTokens) {
    const int64_t count = std::min<int64_t>(kTokens, static_cast<int64_t>(wanted.size() - done));
    const int64_t* const of = wanted.data() + done;
    const auto target = [&](int64_t i) { return targets.typed_data()[of[i]]; };
    for (int64_t i = 0; i < count; ++i) std::memcpy(rows + i * k, x.typed_data() + of[i] * k, static_cast<size_t>(k) * sizeof(float));
    if (auto error = multiply(prepare({rows, count, k}, form_for(w)), w, logits, count, k, n, false); error.failure()) return error;
    Pool::instance().split(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* const row = logits + i * n;
        for (int64_t j = 0; j < values(bias); ++j) row[j] += bias.typed_data()[j];
        softmax[i] = {row, n, times};
        found->typed_data()[of[i]] = active->log_prob(softmax + i, target(i));
      }
    });
    for (int64_t first = 0; sloped && first < n; first += kPart) {
      const int64_t width = std::min(kPart, n - first);
      Pool::instance().split(count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          active->log_prob_slopes(softmax[i], target(i), part + i * width, first, first + width);
        }
      });
      const Rows of_part = prepare({part, count, width}, form_for(transposed));
      if (auto error = multiply_part(of_part, transposed, along, count, n, first, width, k, first > 0); error.failure()) return error;
    }
    for (int64_t i = 0; sloped && i < count; ++i) {
      std::memcpy(slopes->typed_data() + of[i] * k, along + i * k, static_cast<size_t>(k) * sizeof(float));
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_log_probs, log_probs,
                              Ffi::Bind()
                                  .Arg<F32>()             // x
                                  .Arg<ffi::AnyBuffer>()  // w
                                  .Arg<ffi::AnyBuffer>()  // transposed
                                  .Arg<F32>()             // bias
                                  .Arg<S32>()             // targets
                                  .Arg<F32>()             // factor
                                  .Ret<F32>()             // found
                                  .Ret<F32>()             // slopes
                                  .Attr<int64_t>("n"));

}  // namespace jaxlora
