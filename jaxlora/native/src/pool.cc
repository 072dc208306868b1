#include "pool.h"

#include <sched.h>

#include <chrono>
#include <cstdlib>
#include <thread>

namespace jaxlora {
namespace {

constexpr uint32_t kOpen = 1u << 31;
constexpr auto kWatch = std::chrono::microseconds(100);  // longer than what XLA does between two calls of a step

inline void pause() { __builtin_ia32_pause(); }

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

Pool::Pool(int threads) : threads_(threads) {
  for (int i = 1; i < threads; ++i) std::thread([this] { work(); }).detach();
}

void Pool::run(int64_t count, int64_t grain, Task task, const void* context) {
  if (count <= 0) return;
  if (threads_ == 1 || count <= grain || taken_.test_and_set(std::memory_order_acquire)) {
    task(context, 0, count);
    return;
  }
  job_ = {task, context, count, grain};
  next_.store(0, std::memory_order_relaxed);
  gate_.store(kOpen, std::memory_order_release);
  epoch_.fetch_add(1);  // sequentially consistent with asleep_: either the worker sees the job or we see the worker asleep
  if (asleep_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  claim();
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

void Pool::claim() {
  const Job job = job_;
  for (;;) {
    int64_t begin = next_.fetch_add(job.grain, std::memory_order_relaxed);
    if (begin >= job.count) return;
    int64_t end = begin + job.grain;
    job.task(job.context, begin, end < job.count ? end : job.count);
  }
}

void Pool::work() {
  uint32_t seen = 0;
  for (;;) {
    while (!await(seen)) {
    }
    seen = epoch_.load();
    uint32_t gate = gate_.load(std::memory_order_acquire);
    // Joining fails once the caller has closed the gate: from then on the job's fields may change under us.
    while ((gate & kOpen) && !gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
    }
    if (gate & kOpen) {
      claim();
      gate_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }
}

// True when a job newer than `seen` has come; false after a sleep that may have ended for no reason.
bool Pool::await(uint32_t seen) {
  auto until = std::chrono::steady_clock::now() + kWatch;
  do {
    for (int i = 0; i < 32; ++i) {
      if (epoch_.load(std::memory_order_acquire) != seen) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  std::unique_lock<std::mutex> lock(mutex_);
  asleep_.fetch_add(1);
  wake_.wait(lock, [&] { return epoch_.load() != seen; });
  asleep_.fetch_sub(1);
  return true;
}

}  // namespace jaxlora
