// Attention over a cache, and over whole sequences: handlers that XLA calls.
#include <algorithm>

#include "handlers.h"

namespace jaxlora {
namespace {

bool same(ffi::Span<const int64_t> a, ffi::Span<const int64_t> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

ffi::Error attention(F32 qkv, F32 cos, F32 sin, F32 q_norm, F32 k_norm, ffi::AnyBuffer k_cache, ffi::AnyBuffer v_cache, S32 starts,
                     S32 lengths, S32 slots, S32 offsets, F32Result out, ffi::Result<ffi::AnyBuffer> k_result,
                     ffi::Result<ffi::AnyBuffer> v_result, int64_t window, float scale, float eps) {
  const auto xs = qkv.dimensions(), ts = cos.dimensions(), cs = k_cache.dimensions();
  if (xs.size() != 3 || ts.size() != 2 || cs.size() != 4) {
    return bad("attention takes qkv [m, t, (h + 2 kv) d], cos and sin [positions, d / 2], and caches [slots, kv, s, d]");
  }
  Attention a{};
  a.b = static_cast<int64_t>(starts.element_count()), a.tokens = xs[0] * xs[1], a.d = cs[3], a.kv = cs[1], a.s = cs[2];
  a.heads = a.d == 0 ? 0 : xs[2] / a.d - 2 * a.kv;
  if (a.kv == 0 || a.d % 16 || a.d > kMaxHead || xs[2] != (a.heads + 2 * a.kv) * a.d || a.heads <= 0 || a.heads % a.kv ||
      !same(v_cache.dimensions(), cs) || ts[1] != a.d / 2 || !same(sin.dimensions(), ts)) {
    return bad("shapes of queries, keys, values and caches do not fit");
  }
  const auto scales = static_cast<size_t>(a.d);
  if (q_norm.element_count() != k_norm.element_count() || (q_norm.element_count() != 0 && q_norm.element_count() != scales)) {
    return bad("the norms of queries and keys take one scale a value of a head, or none at all");
  }
  if (lengths.element_count() != starts.element_count() || slots.element_count() != starts.element_count() ||
      offsets.element_count() != starts.element_count()) {
    return bad("starts, lengths, slots and offsets take one number a row");
  }
  if (k_result->untyped_data() != k_cache.untyped_data() || v_result->untyped_data() != v_cache.untyped_data()) {
    return bad("the caches are not updated in place");
  }
  const bool bf16 = k_cache.element_type() == ffi::BF16;
  if ((!bf16 && k_cache.element_type() != ffi::F32) || v_cache.element_type() != k_cache.element_type()) {
    return bad("caches are float32 or bfloat16");
  }
  a.qkv = qkv.typed_data(), a.cos = cos.typed_data(), a.sin = sin.typed_data(), a.out = out->typed_data();
  if (q_norm.element_count() != 0) a.q_norm = q_norm.typed_data(), a.k_norm = k_norm.typed_data();
  a.k_cache = k_cache.untyped_data(), a.v_cache = v_cache.untyped_data();
  a.starts = starts.typed_data(), a.lengths = lengths.typed_data(), a.slots = slots.typed_data(), a.offsets = offsets.typed_data();
  a.window = window, a.scale = scale, a.eps = eps;
  for (int64_t b = 0; b < a.b; ++b) {
    const int64_t own = a.tokens_of(b);
    if (own < 0 || (b == 0 && a.offsets[0] != 0)) return bad("offsets do not ascend from 0 to the number of tokens");
    a.longest = std::max(a.longest, own);
    if (a.lengths[b] <= 0) continue;
    if (a.lengths[b] > own || a.starts[b] < 0 || a.starts[b] + a.lengths[b] > std::min(a.s, ts[0]) || a.slots[b] < 0 || a.slots[b] >= cs[0]) {
      return bad("row " + std::to_string(b) + " lies outside of the cache");
    }
  }
  if (a.longest == 0) return ffi::Error::Success();
  Pool& pool = Pool::instance();
  const int64_t group = a.heads / a.kv;
  a.tile = kTileQueries / group > 0 ? kTileQueries / group : 1;
  auto store = [&](int64_t begin, int64_t end) { (bf16 ? active->store_new_bf16 : active->store_new_f32)(a, begin, end); };
  auto attend = [&](int64_t begin, int64_t end) { (bf16 ? active->attend_bf16 : active->attend_f32)(a, begin, end); };
  const int64_t tiles = (a.longest + a.tile - 1) / a.tile;
  if (tiles == 1) {  // nobody reads what another item stores
    pool.split(a.b * a.kv, [&](int64_t begin, int64_t end) {
      store(begin, end);
      attend(begin, end);
    });
  } else {
    pool.split(a.b * a.kv, store);
    pool.split(a.b * tiles * a.kv, attend);
  }
  return ffi::Error::Success();
}

// Fills what attention over whole sequences and its gradient have in common.
ffi::Error read(F32 q, F32 k, F32 v, S32 segments, int64_t window, float scale, Causal* a) {
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions();
  if (qs.size() != 4 || ks.size() != 4 || !same(ks, vs)) {
    return bad("causal attention takes q [b, t, h, d], k and v [b, t, kv, d]");
  }
  a->b = qs[0], a->t = qs[1], a->heads = qs[2], a->d = qs[3], a->kv = ks[2];
  if (ks[0] != a->b || ks[1] != a->t || ks[3] != a->d || a->kv == 0 || a->heads % a->kv || a->d % 16) {
    return bad("shapes of queries, keys and values do not fit");
  }
  if (segments.element_count() != 0) {
    if (segments.element_count() != static_cast<size_t>(a->b * a->t)) return bad("segments takes one number a token, or none at all");
    a->segments = segments.typed_data();
  }
  a->q = q.typed_data(), a->k = k.typed_data(), a->v = v.typed_data();
  a->window = window, a->scale = scale;
  return ffi::Error::Success();
}

ffi::Error causal(F32 q, F32 k, F32 v, S32 segments, F32Result out, int64_t window, float scale) {
  Causal a{};
  if (auto error = read(q, k, v, segments, window, scale, &a); error.failure()) return error;
  a.out = out->typed_data();
  Pool::instance().split(a.b * a.kv, [&](int64_t begin, int64_t end) { active->causal(a, begin, end); });
  return ffi::Error::Success();
}

ffi::Error causal_gradient(F32 q, F32 k, F32 v, S32 segments, F32 d_out, F32Result dq, F32Result dk, F32Result dv, int64_t window,
                           float scale) {
  Causal a{};
  if (auto error = read(q, k, v, segments, window, scale, &a); error.failure()) return error;
  if (d_out.element_count() != q.element_count()) return bad("the slope of the result has another shape than the result");
  a.d_out = d_out.typed_data(), a.dq = dq->typed_data(), a.dk = dk->typed_data(), a.dv = dv->typed_data();
  Pool::instance().split(a.b * a.kv, [&](int64_t begin, int64_t end) { active->causal_gradient(a, begin, end); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_attention, attention,
                              Ffi::Bind()
                                  .Arg<F32>()             // qkv
                                  .Arg<F32>()             // cos
                                  .Arg<F32>()             // sin
                                  .Arg<F32>()             // q_norm
                                  .Arg<F32>()             // k_norm
                                  .Arg<ffi::AnyBuffer>()  // k_cache
                                  .Arg<ffi::AnyBuffer>()  // v_cache
                                  .Arg<S32>()             // starts
                                  .Arg<S32>()             // lengths
                                  .Arg<S32>()             // slots
                                  .Arg<S32>()             // offsets
                                  .Ret<F32>()             // out
                                  .Ret<ffi::AnyBuffer>()  // k_cache
                                  .Ret<ffi::AnyBuffer>()  // v_cache
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_causal, causal,
                              Ffi::Bind()
                                  .Arg<F32>()  // q
                                  .Arg<F32>()  // k
                                  .Arg<F32>()  // v
                                  .Arg<S32>()  // segments
                                  .Ret<F32>()  // out
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_causal_gradient, causal_gradient,
                              Ffi::Bind()
                                  .Arg<F32>()  // q
                                  .Arg<F32>()  // k
                                  .Arg<F32>()  // v
                                  .Arg<S32>()  // segments
                                  .Arg<F32>()  // d_out
                                  .Ret<F32>()  // dq
                                  .Ret<F32>()  // dk
                                  .Ret<F32>()  // dv
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale"));

}  // namespace jaxlora
