// Waiting for another thread that will be done soon: a bounded number of looks with a pause between them.
#pragma once

#ifdef VIVACE_X86
#include <xmmintrin.h>
#endif

namespace vivace {

inline void spin_pause() {
#ifdef VIVACE_X86
  _mm_pause();
#endif
}

// Some 0.2 ms. Where others want the processor, who yields comes back much later: with 27 us, less than some tasks
// take, rows of 2 ms beside a busy machine lost a third of their speed.
constexpr int kSpins = 1 << 13;

// Looks up to kSpins times whether `holds()`; its last answer.
template <typename Condition>
bool spin_until(const Condition& holds) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (holds()) return true;
    spin_pause();
  }
  return holds();
}

}  // namespace vivace
