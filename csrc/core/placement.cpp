#include "core/placement.h"

#include <sched.h>

#include <algorithm>
#include <cctype>
#include <fstream>
#include <sstream>

namespace vivace {
namespace {

std::vector<Processors> read_nodes() {
  std::vector<Processors> nodes;
  std::string list;
  std::getline(std::ifstream("/sys/devices/system/node/online"), list);
  const Processors numbers = parse_processors(list);
  for (size_t node = 0; node < numbers.size(); ++node) {
    if (!numbers[node]) continue;
    std::ifstream file("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist");
    if (std::getline(file, list)) nodes.push_back(parse_processors(list));
  }
  return nodes;
}

}  // namespace

Processors parse_processors(const std::string& list) {
  Processors found;
  std::istringstream parts(list);
  for (std::string part; std::getline(parts, part, ',');) {
    std::istringstream text(part);
    size_t first = 0, last = 0;
    char dash = 0;
    if (part.empty() || !std::isdigit(static_cast<unsigned char>(part[0])) || !(text >> first)) continue;
    last = first;
    if (text >> dash && (dash != '-' || !(text >> last))) continue;
    for (size_t i = first; i <= last && i < found.size(); ++i) found.set(i);
  }
  return found;
}

Processors choose_processors(const std::vector<Processors>& nodes, const Processors& allowed, int here, int threads) {
  if (nodes.size() < 2 || here < 0 || here >= static_cast<int>(allowed.size())) return allowed;
  for (const Processors& node : nodes) {
    const Processors near = node & allowed;
    if (node[static_cast<size_t>(here)] && static_cast<int>(near.count()) >= threads) return near;
  }
  return allowed;
}

Processors place_for(int threads) {
#ifdef __linux__
  static const std::vector<Processors> nodes = read_nodes();
  cpu_set_t set;
  if (nodes.size() < 2 || sched_getaffinity(0, sizeof set, &set) != 0) return {};
  Processors allowed;
  for (size_t i = 0; i < std::min<size_t>(allowed.size(), CPU_SETSIZE); ++i) allowed[i] = CPU_ISSET(i, &set);
  return choose_processors(nodes, allowed, sched_getcpu(), threads);
#else
  (void)threads;
  return {};
#endif
}

void move_to(const Processors& processors) {
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  for (size_t i = 0; i < std::min<size_t>(processors.size(), CPU_SETSIZE); ++i) {
    if (processors[i]) CPU_SET(i, &set);
  }
  sched_setaffinity(0, sizeof set, &set);
#else
  (void)processors;
#endif
}

}  // namespace vivace
