// Round to nearest, subnormals kept, while in scope: the caller may have set flush-to-zero (torch can), pool threads
// have not, and bits must not depend on who runs a chunk.
#pragma once

#ifdef VIVACE_X86
#include <xmmintrin.h>
#endif

namespace vivace {

class FloatMode {
 public:
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;
#ifdef VIVACE_X86
  FloatMode() : saved_(_mm_getcsr()) {
    if (saved_ != kDefault) _mm_setcsr(kDefault);
  }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked
  unsigned saved_;
#else
  FloatMode() = default;
#endif
};

}  // namespace vivace
