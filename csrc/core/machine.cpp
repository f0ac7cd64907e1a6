#include "core/machine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>
#include <thread>

namespace vivace {
namespace {

// Processors' worth of time a cgroup grants, rounded up; 0 when there is no limit. Version 2, then version 1.
int cgroup_quota() {
  std::string path, line;
  for (std::ifstream file("/proc/self/cgroup"); std::getline(file, line);) {
    if (line.rfind("0::", 0) == 0) path = line.substr(3);
  }
  for (const std::string& place : {"/sys/fs/cgroup" + path, std::string("/sys/fs/cgroup")}) {
    std::string quota;
    double period = 0;
    std::ifstream file(place + "/cpu.max");
    if (file >> quota >> period && quota != "max" && period > 0) {
      return std::max(1, static_cast<int>(std::ceil(std::atof(quota.c_str()) / period)));
    }
  }
  double quota = 0, period = 0;
  std::ifstream quota_file("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), period_file("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  if (quota_file >> quota && period_file >> period && quota > 0 && period > 0) {
    return std::max(1, static_cast<int>(std::ceil(quota / period)));
  }
  return 0;
}

int64_t read_cache_bytes() {
  int64_t best = 0;
  for (int index = 0; index < 8; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    int64_t size = 0;
    char unit = 0;
    if (!(file >> size)) continue;
    file >> unit;
    best = std::max(best, size << (unit == 'K' ? 10 : unit == 'M' ? 20 : 0));
  }
#ifdef _SC_LEVEL3_CACHE_SIZE
  if (best == 0) best = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return best > 0 ? best : int64_t{32} << 20;
}

}  // namespace

int usable_processors() {
  static const int quota = cgroup_quota();
  int count = 0;
#ifdef __linux__
  cpu_set_t set;  // read every time: affinity may change while the process runs
  if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
#endif
  if (count == 0) count = static_cast<int>(std::thread::hardware_concurrency());  // reads a file: some 10 us
  if (quota > 0) count = std::min(count, quota);
  return std::max(1, count);
}

int64_t last_level_cache_bytes() {
  static const int64_t bytes = read_cache_bytes();
  return bytes;
}

}  // namespace vivace
