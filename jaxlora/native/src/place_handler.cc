// How an adapter comes into the bank: a handler that XLA calls.
#include <algorithm>
#include <cstring>

#include "handlers.h"

namespace jaxlora {
namespace {

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
