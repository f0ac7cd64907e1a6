// What this process may use: processors (affinity and cgroup quota) and the size of the last-level cache.
#pragma once

#include <cstdint>

namespace vivace {

int usable_processors();
int64_t last_level_cache_bytes();

}  // namespace vivace
