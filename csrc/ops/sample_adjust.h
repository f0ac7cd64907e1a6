// Reductions over a sample: the (low, high, gain) that an update row then applies to an adjusted output.
#pragma once

#include <stdint.h>

#include "ops/solver_step.h"

namespace vivace {

// Every sample is at a reduction row. Nothing but adjust [batch, 3] is written; net, adjust and stream_above of `args`
// are not used. The bits do not depend on the batch, the instruction set or the threads.
//   kThreshold: s = min(max(quantile(|y_0|, ratio), 1), high) gives (-s, s, 1/s)
//   kRescale: (-inf, inf, phi * std(y_1) / std(y_0) + 1 - phi)
void sample_adjust(const SolverStepArgs& args, float* adjust);

// Keys are the bits of |y|: they order as the values do, NaN last.
constexpr int kKeyBits = 31;
constexpr uint32_t kKeyMask = 0x7fffffffu, kInfinityKey = 0x7f800000u, kBins = 1 << 11;

// Keys of one range by bin, and the distance from the end of the range, or from the first NaN, to the next key; what is
// not less than 2^31 is no such distance.
struct KeyCounts {
  uint32_t bins[kBins];
  uint32_t above, beyond;
};

constexpr int kMomentLanes = 16;  // element i of a sample is summed in lane i mod 16, on every instruction set

// Sums of y - mean and of its square, by lane.
struct Moments {
  double first[kMomentLanes], second[kMomentLanes];
};

}  // namespace vivace
