// Attention over a cache, and over whole sequences: handlers that XLA calls.
#include <algorithm>

#include "handlers.h"

namespace jaxlora {
namespace {

bool same(ffi::Span<const int64_t> a, ffi::Span<const int64_t> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

ffi::Error attention(F32 q, F32 k_new, F32 v_new, ffi::AnyBuffer k_cache, ffi::AnyBuffer v_cache, S32 starts, S32 lengths,
                     S32 slots, ffi::ResultBuffer<ffi::F32> out, ffi::Result<ffi::AnyBuffer> k_result,
                     ffi::Result<ffi::AnyBuffer> v_result, int64_t window, float scale) {
  const auto qs = q.dimensions(), ns = k_new.dimensions(), cs = k_cache.dimensions();
  if (qs.size() != 4 || ns.size() != 4 || cs.size() != 4)
    return bad("attention takes q [b, t, h, d] and caches [slots, kv, s, d]");
  Attention a{};
  a.b = qs[0], a.t = qs[1], a.heads = qs[2], a.d = qs[3], a.kv = ns[2], a.s = cs[2];
  if (ns[0] != a.b || ns[1] != a.t || ns[3] != a.d || cs[1] != a.kv || cs[3] != a.d || a.kv == 0 || a.heads % a.kv ||
      !same(v_new.dimensions(), ns) || !same(v_cache.dimensions(), cs) || a.d % 16 || a.d > kMaxHead) {
    return bad("shapes of queries, keys, values and caches do not fit");
  }
  if (starts.element_count() != static_cast<size_t>(a.b) || lengths.element_count() != starts.element_count() ||
      slots.element_count() != starts.element_count()) {
    return bad("starts, lengths and slots take one number a row");
  }
  if (k_result->untyped_data() != k_cache.untyped_data() || v_result->untyped_data() != v_cache.untyped_data()) {
    return bad("the caches are not updated in place");
  }
  const bool bf16 = k_cache.element_type() == ffi::BF16;
  if ((!bf16 && k_cache.element_type() != ffi::F32) || v_cache.element_type() != k_cache.element_type()) {
    return bad("caches are float32 or bfloat16");
  }
  a.q = q.typed_data(), a.k_new = k_new.typed_data(), a.v_new = v_new.typed_data(), a.out = out->typed_data();
  a.k_cache = k_cache.untyped_data(), a.v_cache = v_cache.untyped_data();
  a.starts = starts.typed_data(), a.lengths = lengths.typed_data(), a.slots = slots.typed_data();
  a.window = window, a.scale = scale;
  int64_t tokens = 0;
  for (int64_t b = 0; b < a.b; ++b) {
    if (a.lengths[b] <= 0) continue;
    tokens += a.lengths[b];
    if (a.lengths[b] > a.t || a.starts[b] < 0 || a.starts[b] + a.lengths[b] > a.s || a.slots[b] < 0 || a.slots[b] >= cs[0]) {
      return bad("row " + std::to_string(b) + " lies outside of the cache");
    }
  }
  Pool& pool = Pool::instance();
  const int64_t group = a.heads / a.kv;
  a.tile = kTileQueries / group > 0 ? kTileQueries / group : 1;
  auto store = [&](int64_t begin, int64_t end) { (bf16 ? active->store_new_bf16 : active->store_new_f32)(a, begin, end); };
  if (tokens * a.kv * a.d < kSerial) {
    store(0, a.b * a.kv);
  } else {
    pool.split(a.b * a.kv, store);
  }
  pool.split(a.b * ((a.t + a.tile - 1) / a.tile) * a.kv,
             [&](int64_t begin, int64_t end) { (bf16 ? active->attend_bf16 : active->attend_f32)(a, begin, end); });
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
                                  .Arg<F32>()             // q
                                  .Arg<F32>()             // k_new
                                  .Arg<F32>()             // v_new
                                  .Arg<ffi::AnyBuffer>()  // k_cache
                                  .Arg<ffi::AnyBuffer>()  // v_cache
                                  .Arg<S32>()             // starts
                                  .Arg<S32>()             // lengths
                                  .Arg<S32>()             // slots
                                  .Ret<F32>()             // out
                                  .Ret<ffi::AnyBuffer>()  // k_cache
                                  .Ret<ffi::AnyBuffer>()  // v_cache
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale"));
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
