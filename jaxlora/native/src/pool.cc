#include "pool.h"

#include <pmmintrin.h>
#include <sched.h>

#include <chrono>
#include <cstdlib>
#include <thread>

namespace jaxlora {
namespace {

constexpr uint32_t kOpen = 1u << 31;
constexpr auto kWatch = std::chrono::microseconds(100);  // longer than what XLA does between two calls of a step
constexpr size_t kAhead = 512 << 10;                      // bytes: half of a second-level cache, or a quarter

inline void pause() {
  __builtin_ia32_pause();
}

int default_threads() {
  if (const char* text = std::getenv("JAXLORA_NATIVE_THREADS")) {
    int wanted = std::atoi(text);
    if (wanted > 0) return wanted;
  }
  cpu_set_t cpus;
  return sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
}

}  // namespace

Pool& Pool::instance() {
  static Pool* pool = new Pool(default_threads());
  return *pool;
}

Pool::Pool(int threads) : threads_(threads), stretches_(new Stretch[static_cast<size_t>(threads)]) {
  for (int i = 1; i < threads; ++i) std::thread([this, i] { work(i); }).detach();
}

void Pool::run(int64_t count, int64_t grain, Task task, const void* context) {
  if (count <= 0) return;
  if (threads_ == 1 || count <= grain || taken_.test_and_set(std::memory_order_acquire)) {
    task(context, 0, count);
    return;
  }
  job_ = {task, context, static_cast<uint32_t>(grain)};
  for (int i = 0; i < threads_; ++i) {
    const uint64_t begin = static_cast<uint64_t>(count * i / threads_), end = static_cast<uint64_t>(count * (i + 1) / threads_);
    stretches_[i].range.store(begin << 32 | end, std::memory_order_relaxed);
  }
  gate_.store(kOpen, std::memory_order_release);
  epoch_.fetch_add(1);  // sequentially consistent with asleep_: either the worker sees the job or we see the worker asleep
  if (asleep_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  take_all(0);
  gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int spins = 0; gate_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < 2000) {
      pause();
    } else {
      sched_yield();  // a worker inside a grain has lost its core
    }
  }
  taken_.clear(std::memory_order_release);
}

bool Pool::Stretch::take(bool front, uint32_t grain, uint32_t* begin, uint32_t* end) {
  uint64_t old = range.load(std::memory_order_relaxed), rest;
  do {
    const uint32_t low = static_cast<uint32_t>(old >> 32), high = static_cast<uint32_t>(old);
    if (low >= high) return false;
    const uint32_t taken = high - low < grain ? high - low : grain;
    *begin = front ? low : high - taken;
    *end = *begin + taken;
    rest = front ? static_cast<uint64_t>(low + taken) << 32 | high : static_cast<uint64_t>(low) << 32 | (high - taken);
  } while (!range.compare_exchange_weak(old, rest, std::memory_order_relaxed));
  return true;
}

void Pool::take_all(int self) {
  const Job job = job_;
  uint32_t begin, end;
  for (int i = 0; i < threads_; ++i) {
    Stretch& stretch = stretches_[(self + i) % threads_];
    while (stretch.take(i == 0, job.grain, &begin, &end)) job.task(job.context, begin, end);
  }
}

void Pool::work(int self) {
  // As XLA has its threads take numbers below the normal ones as zero, so that it does not matter who computes what.
  _MM_SET_FLUSH_ZERO_MODE(_MM_FLUSH_ZERO_ON);
  _MM_SET_DENORMALS_ZERO_MODE(_MM_DENORMALS_ZERO_ON);
  uint32_t seen = 0;
  for (;;) {
    await(self, seen);
    seen = epoch_.load();
    uint32_t gate = gate_.load(std::memory_order_acquire);
    // Joining fails once the caller has closed the gate: from then on the job's fields may change under us.
    while ((gate & kOpen) && !gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
    }
    if (gate & kOpen) {
      take_all(self);
      gate_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }
}

// A few lines of what is expected, of this worker's stretch.
void Pool::fetch_more(int self, Ahead& ahead) {
  const char* data = expected_.load(std::memory_order_relaxed);
  if (data != ahead.data) ahead = {data, 0};
  const size_t bytes = expected_bytes_.load(std::memory_order_relaxed), share = bytes / static_cast<size_t>(threads_);
  if (!data || ahead.done >= (share < kAhead ? share : kAhead)) return pause();
  for (const char *at = data + bytes * static_cast<size_t>(self) / threads_ + ahead.done, *end = at + 256; at < end; at += 64) {
    __builtin_prefetch(at, 0, 2);
  }
  ahead.done += 256;
}

// Returns when a job newer than `seen` has come.
void Pool::await(int self, uint32_t seen) {
  thread_local Ahead ahead;
  auto until = std::chrono::steady_clock::now() + kWatch;
  do {
    for (int i = 0; i < 32; ++i) {
      if (epoch_.load(std::memory_order_acquire) != seen) return;
      fetch_more(self, ahead);
    }
  } while (std::chrono::steady_clock::now() < until);
  std::unique_lock<std::mutex> lock(mutex_);
  asleep_.fetch_add(1);
  wake_.wait(lock, [&] { return epoch_.load() != seen; });
  asleep_.fetch_sub(1);
}

}  // namespace jaxlora
