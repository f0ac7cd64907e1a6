// A team: threads that go through the same sequence of stages together, woken once for all of it.
//
//   run_team(threads, [&](Member& member) {
//     member.stage(count1, [&](int64_t i) { ... });
//     member.stage(count2, [&](int64_t i) { ... });   // begins when every task of the first is done
//   });
//
// Every member calls the same stages with the same counts. A stage waits for tasks, not for members: one that wakes
// late or loses its processor between two tasks holds up nobody, and walks through what has been done without it.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/thread_pool.h"

namespace vivace {

class Team;

class Member {
 public:
  Member(Team& team, int number) : team_(team), number_(number) {}

  // 0: the caller; below the size of the team. No two members share one at a time.
  int number() const { return number_; }

  // Returns when all tasks of the stages so far are done, by whomever.
  void wait();

  // wait(), then task(i) for those i in [0, count) that no other member takes; others may still be at theirs on return.
  // Each member has a range of its own, the same one every call: what it wrote last time is in its cache. Who is done
  // takes from the others' ranges, so a busy core delays nobody.
  template <typename Task>
  void stage(int64_t count, const Task& task);

 private:
  Team& team_;
  int number_;
  int64_t stage_ = 0;  // stages begun
  int64_t tasks_ = 0;  // of all stages begun
};

class Team {
 public:
  // At most kMostThreads members.
  explicit Team(int members);

  template <typename Body>
  void run(const Body& body) {
    struct Context {
      Team& team;
      const Body& body;
    } context{*this, body};
    const auto work = [](void* pointer, int number) {
      auto& [team, body] = *static_cast<Context*>(pointer);
      Member member(team, number);
      body(member);
      if (number == 0) member.wait();
    };
    on_threads(members_, work, &context);
  }

 private:
  friend class Member;

  // A range of tasks: the number of the last stage that began in it, then how many bits for its next task.
  static constexpr int kTaskBits = 40;
  struct alignas(64) Range {
    std::atomic<uint64_t> state{0};
  };

  // The next task of [begin, end), the range's share of this stage; -1 when there is none, or the stage is long over.
  // Who finds the range at an earlier stage begins it: all tasks of that one are done, so nobody wants more of it.
  static int64_t take(Range& range, uint64_t stage, int64_t begin, int64_t end) {
    constexpr uint64_t kTask = (uint64_t{1} << kTaskBits) - 1;
    uint64_t seen = range.state.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t begun = seen >> kTaskBits;
      const int64_t next = begun < stage ? begin : static_cast<int64_t>(seen & kTask);
      if (begun > stage || next >= end) return -1;
      const uint64_t taken = stage << kTaskBits | static_cast<uint64_t>(next + 1);
      if (range.state.compare_exchange_weak(seen, taken, std::memory_order_relaxed)) return next;
    }
  }

  int members_;
  Range range_[kMostThreads];
  alignas(64) std::atomic<int64_t> done_{0};  // tasks of all stages
};

template <typename Task>
void Member::stage(int64_t count, const Task& task) {
  wait();
  ++stage_, tasks_ += count;
  int64_t own = 0;
  const int ranges = team_.members_;
  for (int step = 0; step < ranges; ++step) {
    const int r = (number_ + step) % ranges;
    const int64_t begin = count * r / ranges, end = count * (r + 1) / ranges;
    for (int64_t i; (i = Team::take(team_.range_[r], static_cast<uint64_t>(stage_), begin, end)) >= 0; ++own) task(i);
  }
  if (own > 0) team_.done_.fetch_add(own, std::memory_order_release);
}

// How many of `threads` a team has: no more than the process has processors.
int team_size(int64_t threads);

// body(member) on a team of up to `threads` members; returns when every member has left.
template <typename Body>
void run_team(int64_t threads, const Body& body) {
  Team(team_size(threads)).run(body);
}

}  // namespace vivace
