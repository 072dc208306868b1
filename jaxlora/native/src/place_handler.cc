// How an adapter comes into the bank: a handler that XLA calls.
#include <algorithm>
#include <cstring>

#include "handlers.h"

namespace jaxlora {
namespace {

// Copies a piece of an adapter into a slot of the bank, behind `number` others of its size; what lies beyond the slot's end is left out.
ffi::Error place(ffi::AnyBuffer bank_in, ffi::AnyBuffer piece, S32 slot, S32 number, ffi::Result<ffi::AnyBuffer> bank) {
  const auto bs = bank->dimensions();
  if (bs.size() != 2) return bad("place takes bank [slots, size]");
  if (bank->untyped_data() != bank_in.untyped_data()) return bad("the bank is not updated in place");
  if (piece.element_type() != bank->element_type()) return bad("the piece has another type than the bank");
  const auto size = static_cast<int64_t>(piece.element_count());
  const int64_t at = slot.typed_data()[0], begin = number.typed_data()[0] * size;
  if (at < 0 || at >= bs[0] || begin < 0 || begin > bs[1]) return bad("the adapter lies outside of the bank");
  const auto width = static_cast<int64_t>(ffi::ByteWidth(piece.element_type()));
  const int64_t count = std::min(size, bs[1] - begin);
  std::memcpy(static_cast<char*>(bank->untyped_data()) + (at * bs[1] + begin) * width, piece.untyped_data(), static_cast<size_t>(count * width));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_place, place,
                              Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()  // bank
                                  .Arg<ffi::AnyBuffer>()  // piece
                                  .Arg<S32>()             // slot
                                  .Arg<S32>()             // number
                                  .Ret<ffi::AnyBuffer>());  // bank

}  // namespace jaxlora
