#include "core/team.h"

#include <sched.h>

#include <algorithm>

#include "core/machine.h"
#include "core/spin.h"

namespace vivace {

Team::Team(int members) : members_(std::clamp(members, 1, kMostThreads)) {}

void Member::wait() {
  const auto done = [this] { return team_.done_.load(std::memory_order_acquire) >= tasks_; };
  while (!spin_until(done)) sched_yield();  // more threads than processors: let the one that has the task run
}

int team_size(int64_t threads) {
  if (threads <= 1) return 1;
  return static_cast<int>(std::min<int64_t>({threads, usable_processors(), kMostThreads}));
}

}  // namespace vivace
