#include "core/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "core/machine.h"
#include "core/placement.h"
#include "core/spin.h"
#include "core/team.h"

namespace vivace {
namespace {

// Waking a sleeping thread costs some 40 us, the time one core moves 4 MiB in cache. Solver step on two cores, us with
// one thread / two, data in cache where it fits: 2 MiB 22 / 36, 8 MiB 73 / 78, 16 MiB 135 / 121, 32 MiB 409 / 271.
constexpr int64_t kOneThreadBytes = int64_t{16} << 20;

// A helper looks for its next call for some 30 us before it sleeps, and gives its processor to whoever wants it
// meanwhile: an int8_linear of 0.45 ms after another one, on two threads, takes 20 us less.
constexpr int kTurns = 16;

struct Call {
  void (*work)(void*, int);
  void* context;
  Processors place;  // where helpers run; none: where they are
};

class ThreadPool {
 public:
  void run(const Call& call, int members) {
    if (busy_.exchange(true, std::memory_order_acquire)) return call.work(call.context, 0);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start(members - 1);
      call_ = call;
      for (int member = 1; member < members; ++member) called_[member] = true;
    }
    for (int member = 1; member < members; ++member) wake_[member].notify_one();
    call.work(call.context, 0);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::fill(called_, called_ + members, false);  // who has not woken by now is not waited for
    }
    if (!spin_until([this] { return active_.load(std::memory_order_acquire) == 0; })) {
      std::unique_lock<std::mutex> lock(mutex_);
      idle_.wait(lock, [this] { return active_ == 0; });
    }
    busy_.store(false, std::memory_order_release);
  }

 private:
  void start(int helpers) {
    try {
      for (; started_ < helpers; ++started_) std::thread(&ThreadPool::serve, this, started_ + 1).detach();
    } catch (const std::system_error&) {  // the system grants no more; those there do the work
    }
  }

  void serve(int member) {
    Processors place;
    const auto called = [&] { return called_[member].load(std::memory_order_relaxed); };
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_[member].wait(lock, called);
      called_[member] = false;
      active_.fetch_add(1, std::memory_order_relaxed);
      const Call call = call_;
      lock.unlock();
      if (call.place.any() && call.place != place) move_to(place = call.place);
      call.work(call.context, member);
      lock.lock();
      if (active_.fetch_sub(1, std::memory_order_release) == 1) idle_.notify_one();
      lock.unlock();
      for (int turn = 0; turn < kTurns && !spin_until(called, kSpins / kTurns); ++turn) sched_yield();
      lock.lock();
    }
  }

  std::atomic<bool> busy_{false};  // a caller's work runs
  std::mutex mutex_;
  std::condition_variable wake_[kMostThreads], idle_;
  Call call_{};
  std::atomic<bool> called_[kMostThreads] = {};  // set under the mutex
  std::atomic<int> active_{0};                   // changed under the mutex
  int started_ = 0;
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

void on_threads(int members, void (*work)(void*, int), void* context) {
  members = std::min(members, kMostThreads);
  if (members <= 1) return work(context, 0);
  pool().run({work, context, place_for(members)}, members);
}

void parallel_for(int threads, int64_t count, void (*task)(const void*, int64_t), const void* context) {
  const auto members = static_cast<int>(std::min<int64_t>(threads, count));
  if (members > 1) {
    Team team(members);
    team.run([&](Member& member) { member.stage(count, [&](int64_t i) { task(context, i); }); });
  } else {
    for (int64_t i = 0; i < count; ++i) task(context, i);
  }
}

int threads_for(int64_t bytes, int64_t limit) {
  if (bytes < kOneThreadBytes || limit <= 1) return 1;
  return static_cast<int>(std::min<int64_t>(limit, usable_processors()));
}

}  // namespace vivace
