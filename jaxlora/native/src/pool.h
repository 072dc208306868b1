// A pool of worker threads for calls that last tens of microseconds.
//
// Work is claimed in grains from one counter, so the caller never waits for a worker that has not woken yet: on a busy machine it
// does the work itself. Workers watch for the next call for a bounded time (calls follow each other closely inside a step) and
// sleep afterwards. Callers that find the pool taken by another thread run alone. Which thread runs a grain never changes results.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace jaxlora {

class Pool {
 public:
  using Task = void (*)(const void* context, int64_t begin, int64_t end);

  // The process's pool. It lives until the process ends, and so do its threads.
  static Pool& instance();

  // Threads that share the work, the caller included.
  int threads() const { return threads_; }

  // Runs task(context, begin, end) over disjoint ranges that cover [0, count), `grain` (1 or more) items at a time.
  void run(int64_t count, int64_t grain, Task task, const void* context);

  // The same for a callable of (begin, end); `parts` ranges a thread, so that a thread that is held up does not hold up the call.
  template <typename F>
  void split(int64_t count, const F& body, int64_t parts = 4) {
    int64_t pieces = threads_ * parts;
    auto task = [](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); };
    run(count, (count + pieces - 1) / pieces, task, &body);
  }

 private:
  explicit Pool(int threads);
  void work();
  void claim();
  bool await(uint32_t seen);

  struct Job {
    Task task;
    const void* context;
    int64_t count, grain;
  };

  const int threads_;
  Job job_{};
  alignas(64) std::atomic<int64_t> next_{0};    // the first item that nobody has claimed
  alignas(64) std::atomic<uint32_t> gate_{0};   // kOpen while a job may be joined, plus the number of workers inside
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts jobs
  alignas(64) std::atomic<int> asleep_{0};
  alignas(64) std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace jaxlora
