// The order in which weights are read: what follows which is what followed it the last time, as every step goes through the layers alike.
#pragma once

#include <atomic>

#include "pool.h"

namespace jaxlora {

class Order {
 public:
  // The order of this process's products.
  static Order& instance() {
    static Order* order = new Order;
    return *order;
  }

  // Says that weights are about to be read, and tells the pool what to expect after them.
  void reading(const void* weights, size_t bytes) {
    Entry& before = entry_of(last_.exchange(weights, std::memory_order_relaxed));
    before.next.store(weights, std::memory_order_relaxed);
    before.bytes.store(bytes, std::memory_order_relaxed);
    const Entry& now = entry_of(weights);
    Pool::instance().expect(now.next.load(std::memory_order_relaxed), now.bytes.load(std::memory_order_relaxed));
  }

 private:
  // Of whatever falls on the same place, the one that came last: what is expected is only fetched, and never has to be right.
  struct Entry {
    std::atomic<const void*> next{nullptr};
    std::atomic<size_t> bytes{0};
  };

  static constexpr int kBits = 12;

  Entry& entry_of(const void* weights) {
    return entries_[(reinterpret_cast<uintptr_t>(weights) >> 6) * 0x9e3779b97f4a7c15u >> (64 - kBits)];
  }

  Entry entries_[1 << kBits];
  std::atomic<const void*> last_{nullptr};
};

}  // namespace jaxlora
