// Unit normals from counters: Philox4x32-10 and Box-Muller as engine/noise.py defines them, bit for bit.
#pragma once

#include <stdint.h>

namespace vivace {

// Elements one sample may have when it draws noise: the counter's second word (i >> 34) is then always zero.
constexpr int64_t kMaxNoiseElements = int64_t{1} << 34;

// Bytes a core moves in cache in the time it makes one normal (0.8 ns): what `threads_for` is fed.
constexpr int64_t kBytesPerNormal = 96;

// out[b][i] = normal(seeds[b], pictures[b], draw, i) for b < batch, i < numel; out is float32 [batch, numel].
void philox_normal(float* out, int64_t batch, int64_t numel, const int64_t* seeds, const int64_t* pictures,
                   int64_t draw, int64_t threads);

}  // namespace vivace
