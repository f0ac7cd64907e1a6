#include "core/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "core/machine.h"

namespace vivace {
namespace {

// Waking a sleeping thread costs some 40 us, the time one core moves 4 MiB in cache. Solver step on two cores, us with
// one thread / two, data in cache where it fits: 2 MiB 22 / 36, 8 MiB 73 / 78, 16 MiB 135 / 121, 32 MiB 409 / 271.
constexpr int64_t kOneThreadBytes = int64_t{16} << 20;

// Every thread has a range of its own, the same one every call: what it wrote last time is in its cache. Who is done
// takes tasks from the others' ranges, so a busy core delays nobody.
struct Job {
  static constexpr int kMaxRanges = 64;
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };

  Job(int threads, int64_t count, void (*task)(const void*, int64_t), const void* context)
      : task(task), context(context), ranges(threads) {
    for (int r = 0; r < ranges; ++r) {
      range[r].next.store(count * r / ranges, std::memory_order_relaxed);
      range[r].end = count * (r + 1) / ranges;
    }
  }

  void work(int first) {
    for (int r = first; r < first + ranges; ++r) {
      Range& own = range[r % ranges];
      for (int64_t i; (i = own.next.fetch_add(1, std::memory_order_relaxed)) < own.end;) task(context, i);
    }
  }

  void (*task)(const void*, int64_t);
  const void* context;
  int ranges;
  Range range[kMaxRanges];
};

class ThreadPool {
 public:
  void run(Job& job, int helpers) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return job.work(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start(helpers);
      job_ = &job;
      wanted_ = helpers;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    job.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // who has not woken by now is not waited for
    idle_.wait(lock, [this] { return active_ == 0; });
    job_ = nullptr;
  }

 private:
  void start(int helpers) {
    try {
      for (; started_ < helpers; ++started_) std::thread(&ThreadPool::serve, this, started_ + 1).detach();
    } catch (const std::system_error&) {  // the system grants no more; those there do the work
    }
  }

  void serve(int number) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++active_;
      Job* job = job_;
      lock.unlock();
      job->work(number % job->ranges);
      lock.lock();
      if (--active_ == 0) idle_.notify_one();
    }
  }

  std::mutex busy_;  // held by the caller whose job runs
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  Job* job_ = nullptr;
  int wanted_ = 0, active_ = 0, started_ = 0;
};

// Never destroyed: detached threads may outlive static destructors. A forked child has none of the threads and perhaps
// a locked mutex, so it forgets the pool and makes another on first use.
std::atomic<ThreadPool*> g_pool{nullptr};

ThreadPool& pool() {
  ThreadPool* current = g_pool.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); });
  (void)registered;
  auto* fresh = new ThreadPool;
  if (g_pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;  // another thread was first; this one has started no threads
  return *current;
}

}  // namespace

void parallel_for(int threads, int64_t count, void (*task)(const void*, int64_t), const void* context) {
  const int workers = static_cast<int>(std::min<int64_t>({threads, count, Job::kMaxRanges}));
  if (workers > 1) {
    Job job(workers, count, task, context);
    pool().run(job, workers - 1);
  } else {
    for (int64_t i = 0; i < count; ++i) task(context, i);
  }
}

int threads_for(int64_t bytes, int64_t limit) {
  if (bytes < kOneThreadBytes || limit <= 1) return 1;
  return static_cast<int>(std::min<int64_t>(limit, usable_processors()));
}

}  // namespace vivace
