#include "ops/philox_normal.h"

#include <algorithm>

#include "core/error.h"
#include "core/float_mode.h"
#include "core/thread_pool.h"
#include "simd/cpu.h"

namespace vivace {

void philox_normal(float* out, int64_t batch, int64_t numel, const int64_t* seeds, const int64_t* pictures,
                   int64_t draw, int64_t threads) {
  if (batch < 0 || numel < 0) fail("philox_normal: batch ", batch, " and size ", numel, " must not be negative");
  if (static_cast<double>(batch) * numel > 0x1p60)
    fail("philox_normal: ", batch, " x ", numel, " elements fit no memory");
  if (numel > kMaxNoiseElements) fail("philox_normal: ", numel, " elements a sample; at most ", kMaxNoiseElements);
  if (draw < 0 || draw > UINT32_MAX) fail("philox_normal: draw ", draw, " is not in [0, 2^32)");
  if (batch * numel == 0) return;
  if (out == nullptr) fail("philox_normal: no output");
  const Kernels& table = kernels();
  constexpr int64_t kChunk = 1 << 15;  // a multiple of every block; some 25 us of work
  const int64_t chunks = (numel + kChunk - 1) / kChunk;
  parallel_for(threads_for(kBytesPerNormal * batch * numel, threads), batch * chunks, [&](int64_t task) {
    const FloatMode mode;
    const int64_t b = task / chunks, begin = task % chunks * kChunk;
    table.normal_span(out + b * numel, begin, std::min(begin + kChunk, numel), static_cast<uint64_t>(seeds[b]),
                      static_cast<uint32_t>(pictures[b]), static_cast<uint32_t>(draw));
  });
}

}  // namespace vivace
