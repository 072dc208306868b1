// A pool of worker threads for calls that last tens of microseconds.
//
// Each thread owns a stretch of the items and takes them from its front, so that it streams through memory; one that has finished
// takes grains from the back of the others' stretches. The caller thus never waits for a worker that has not woken: on a busy
// machine it does the work itself. Workers watch for the next call for a bounded time (calls follow each other closely inside a
// step) and sleep afterwards. Callers that find the pool taken by another thread run alone. Which thread runs an item never
// changes results.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace jaxlora {

class Pool {
 public:
  using Task = void (*)(const void* context, int64_t begin, int64_t end);

  // The process's pool. It lives until the process ends, and so do its threads.
  static Pool& instance();

  // Threads that share the work, the caller included.
  int threads() const { return threads_; }

  // Runs task(context, begin, end) over disjoint ranges of at most `grain` items that cover [0, count).
  void run(int64_t count, int64_t grain, Task task, const void* context);

  // The same for a callable of (begin, end).
  template <typename F>
  void split(int64_t count, const F& body, int64_t grain = 1) {
    run(count, grain, [](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); }, &body);
  }

  // Says what will be read next (null: nobody knows). Workers that wait for it fetch the beginning of their share into their caches:
  // between the products of a step memory would have nothing to do. Any thread may call this.
  void expect(const void* data, size_t bytes) {
    expected_.store(static_cast<const char*>(data), std::memory_order_relaxed);
    expected_bytes_.store(bytes, std::memory_order_relaxed);
  }

 private:
  explicit Pool(int threads);
  void work(int self);
  void take_all(int self);
  void await(int self, uint32_t seen);

  struct Job {
    Task task;
    const void* context;
    uint32_t grain;
  };

  // The items [begin, end) of one thread that nobody has taken yet.
  struct alignas(64) Stretch {
    std::atomic<uint64_t> range{0};
    bool take(bool front, uint32_t grain, uint32_t* begin, uint32_t* end);
  };

  // How far one worker has fetched what is expected.
  struct Ahead {
    const char* data = nullptr;
    size_t done = 0;
  };

  void fetch_more(int self, Ahead& ahead);

  const int threads_;
  const std::unique_ptr<Stretch[]> stretches_;
  Job job_{};
  alignas(64) std::atomic<uint32_t> gate_{0};   // kOpen while a job may be joined, plus the number of workers inside
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts jobs
  alignas(64) std::atomic<int> asleep_{0};
  alignas(64) std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
  std::atomic<const char*> expected_{nullptr};
  std::atomic<size_t> expected_bytes_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

constexpr int64_t kSerial = 1 << 14;  // values of rows below which waking a worker costs more than it saves

// body(begin, end) for m rows of n values each, by all threads where there are many.
template <typename Body>
void split_rows(int64_t m, int64_t n, const Body& body) {
  if (m * n < kSerial) {
    body(0, m);
  } else {
    Pool::instance().split(m, body, 8);
  }
}

}  // namespace jaxlora
