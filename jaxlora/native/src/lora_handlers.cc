// The adapters of a batch, and how one comes into the bank: handlers that XLA calls.
#include <algorithm>
#include <cstring>
#include <vector>

#include "handlers.h"

namespace jaxlora {
namespace {

ffi::Error lora(F32 y_in, F32 x, ffi::AnyBuffer bank, S32 start, S32 row_slot, S32 rank, ffi::ResultBuffer<ffi::F32> y,
                ffi::Span<const int64_t> a_offsets, ffi::Span<const int64_t> b_offsets, ffi::Span<const int64_t> columns,
                ffi::Span<const int64_t> widths, int64_t ranks) {
  const auto xs = x.dimensions(), ys = y->dimensions(), bs = bank.dimensions();
  if (xs.size() != 2 || ys.size() != 2 || bs.size() != 2 || xs[0] != ys[0])
    return bad("lora takes y [m, n], x [m, k], bank [slots, size]");
  if (y->untyped_data() != y_in.untyped_data()) return bad("y is not updated in place");
  const bool bf16 = bank.element_type() == ffi::BF16, int8 = bank.element_type() == ffi::S8;
  if (!bf16 && !int8 && bank.element_type() != ffi::F32) return bad("the bank is float32, bfloat16 or int8");
  const int64_t m = xs[0], k = xs[1], n = ys[1], slots = bs[0];
  if (row_slot.element_count() != static_cast<size_t>(m)) return bad("row_slot takes one number a row");
  if (rank.element_count() != static_cast<size_t>(slots)) return bad("rank takes one number a slot");
  if (start.element_count() != 1) return bad("start takes one number");

  std::vector<LoraModule> modules;
  for (size_t i = 0; i < a_offsets.size(); ++i) {
    LoraModule module{start.typed_data()[0] + a_offsets[i], start.typed_data()[0] + b_offsets[i], columns[i], widths[i]};
    if (module.a < 0 || module.b < 0 || module.column < 0 || module.a + ranks * k > bs[1] ||
        module.b + ranks * (module.n + (int8 ? kScaleBytes : 0)) > bs[1] || module.column + module.n > n) {
      return bad("module " + std::to_string(i) + " lies outside of the bank or of y");
    }
    modules.push_back(module);
  }

  // Rows in the order of their slots: a count, then their places.
  std::vector<int64_t> place(static_cast<size_t>(slots) + 1), rows(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) {
    int32_t slot = row_slot.typed_data()[i];
    if (slot >= slots)
      return bad("row " + std::to_string(i) + " names slot " + std::to_string(slot) + " of " + std::to_string(slots));
    if (slot >= 0) ++place[static_cast<size_t>(slot) + 1];
  }
  std::vector<LoraGroup> groups;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t begin = place[static_cast<size_t>(slot)], count = place[static_cast<size_t>(slot) + 1];
    const int64_t true_rank = rank.typed_data()[slot];
    if (count && true_rank > ranks) return bad("slot " + std::to_string(slot) + " has a rank above the bank's");
    if (count && true_rank > 0) groups.push_back({slot, true_rank, begin, begin + count});
    place[static_cast<size_t>(slot) + 1] += begin;
  }
  for (int64_t i = 0; i < m; ++i) {
    int32_t slot = row_slot.typed_data()[i];
    if (slot >= 0) rows[static_cast<size_t>(place[static_cast<size_t>(slot)]++)] = i;
  }
  if (groups.empty()) return ffi::Error::Success();

  std::vector<LoraItem> down, up;
  for (size_t g = 0; g < groups.size(); ++g) {
    for (size_t i = 0; i < modules.size(); ++i) {
      const auto group = static_cast<int64_t>(g), module = static_cast<int64_t>(i);
      for (int64_t r = 0; r < groups[g].rank; r += kRankBlock) down.push_back({group, module, r});
      for (int64_t c = 0; c < modules[i].n; c += kColumnBlock) up.push_back({group, module, c});
    }
  }
  const size_t hidden_size = modules.size() * static_cast<size_t>(m * ranks) * sizeof(float);
  auto* hidden = static_cast<char*>(scratch.reserve(hidden_size + rows_space(bf16, m, k)));
  const Lora l{rows_for(bf16, x.typed_data(), m, k, hidden + hidden_size),
               bank.untyped_data(),
               hidden,
               y->typed_data(),
               rows.data(),
               groups.data(),
               modules.data(),
               down.data(),
               up.data(),
               static_cast<int64_t>(down.size()),
               static_cast<int64_t>(up.size()),
               bs[1],
               m,
               k,
               row_stride(bf16, k),
               n,
               ranks};
  const auto lora_down = int8 ? active->lora_down_i8 : bf16 ? active->lora_down_bf16 : active->lora_down_f32;
  const auto lora_up = int8 ? active->lora_up_i8 : bf16 ? active->lora_up_bf16 : active->lora_up_f32;
  Pool& pool = Pool::instance();
  pool.split(l.down_count, [&](int64_t begin, int64_t end) { lora_down(l, begin, end); });
  pool.split(l.up_count, [&](int64_t begin, int64_t end) { lora_up(l, begin, end); });
  return ffi::Error::Success();
}

// Copies a piece of an adapter into a slot of the bank. In the bank a part (A, B or scales of a module) has room for `ranks` ranks; an adapter
// comes with its parts in the same order one behind the other, each of `rank` ranks. The piece begins at value `first` of that.
ffi::Error place(ffi::AnyBuffer bank_in, ffi::AnyBuffer piece, S32 slot, S32 rank, S32 first, ffi::Result<ffi::AnyBuffer> bank,
                 ffi::Span<const int64_t> offsets, int64_t ranks) {
  const auto bs = bank->dimensions();
  if (bs.size() != 2 || offsets.size() < 1 || offsets.end()[-1] != bs[1]) return bad("place takes bank [slots, size] and its parts");
  if (bank->untyped_data() != bank_in.untyped_data()) return bad("the bank is not updated in place");
  if (piece.element_type() != bank->element_type()) return bad("the piece has another type than the bank");
  const int64_t at = slot.typed_data()[0], used = rank.typed_data()[0], begin = first.typed_data()[0];
  const int64_t end = begin + static_cast<int64_t>(piece.element_count());
  if (at < 0 || at >= bs[0] || used < 0 || used > ranks || begin < 0) return bad("the adapter lies outside of the bank");
  const auto width = static_cast<int64_t>(ffi::ByteWidth(piece.element_type()));
  const auto* source = static_cast<const char*>(piece.untyped_data());
  auto* target = static_cast<char*>(bank->untyped_data()) + at * bs[1] * width;
  for (size_t i = 0; i + 1 < offsets.size(); ++i) {
    const int64_t part = offsets[i] / ranks * used, after = offsets[i + 1] / ranks * used;
    const int64_t low = std::max(part, begin), high = std::min(after, end);
    if (low < high) {
      std::memcpy(target + (offsets[i] + low - part) * width, source + (low - begin) * width, static_cast<size_t>((high - low) * width));
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_lora, lora,
                              Ffi::Bind()
                                  .Arg<F32>()             // y
                                  .Arg<F32>()             // x
                                  .Arg<ffi::AnyBuffer>()  // bank
                                  .Arg<S32>()             // start
                                  .Arg<S32>()             // row_slot
                                  .Arg<S32>()             // rank
                                  .Ret<F32>()             // y
                                  .Attr<ffi::Span<const int64_t>>("a_offsets")
                                  .Attr<ffi::Span<const int64_t>>("b_offsets")
                                  .Attr<ffi::Span<const int64_t>>("columns")
                                  .Attr<ffi::Span<const int64_t>>("widths")
                                  .Attr<int64_t>("ranks"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_place, place,
                              Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()  // bank
                                  .Arg<ffi::AnyBuffer>()  // piece
                                  .Arg<S32>()             // slot
                                  .Arg<S32>()             // rank
                                  .Arg<S32>()             // first
                                  .Ret<ffi::AnyBuffer>()  // bank
                                  .Attr<ffi::Span<const int64_t>>("offsets")
                                  .Attr<int64_t>("ranks"));

}  // namespace jaxlora
