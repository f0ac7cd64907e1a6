// Where helpers run on machines whose memory has several nodes: beside the caller, if they all fit there.
#pragma once

#include <bitset>
#include <string>
#include <vector>

namespace vivace {

using Processors = std::bitset<1024>;

// "0-3,8" -> {0, 1, 2, 3, 8}, the lists of /sys/devices/system; what is not understood is left out.
Processors parse_processors(const std::string& list);

// Those of `allowed` on the node of processor `here`, when there are several nodes and that one has `threads` or more;
// else `allowed`.
Processors choose_processors(const std::vector<Processors>& nodes, const Processors& allowed, int here, int threads);

// The choice for helpers of the calling thread; none on a machine of one node, where nothing is to be done.
Processors place_for(int threads);

// The calling thread runs on these from now on, if the system agrees.
void move_to(const Processors& processors);

}  // namespace vivace
