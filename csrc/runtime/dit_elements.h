// Elements of a DiT's latents and activations, one by one: patches, pixels, and whether numbers are finite.
#pragma once

#include <string.h>

#include <cmath>
#include <cstdint>

#include "runtime/dit_row.h"

namespace vivace {

inline float widened(float x) { return x; }

inline float widened(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void store(float* to, float x) { *to = x; }

inline void store(uint16_t* to, float x) {  // to nearest even; NaN stays
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  *to = static_cast<uint16_t>(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Tokens [begin, end) of one sample, with ids those: pixels of each patch side by side, by channel, row, column.
template <typename X, typename T>
void gather_patches(const X* x, T* out, const DitSizes& sizes, int64_t height, int64_t width, const int32_t* ids,
                    int64_t begin, int64_t end) {
  const int64_t patch = sizes.patch, across = width / patch;
  T* to = out + begin * sizes.channels * patch * patch;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = ids == nullptr ? i : ids[i];
    const X* corner = x + token / across * patch * width + token % across * patch;
    for (int64_t c = 0; c < sizes.channels; ++c) {
      for (int64_t row = 0; row < patch; ++row) {
        for (int64_t column = 0; column < patch; ++column)
          store(to++, widened(corner[(c * height + row) * width + column]));
      }
    }
  }
}

template <typename T>
bool all_finite(const T* x, int64_t count) {
  bool fine = true;
  for (int64_t i = 0; i < count; ++i) fine = fine && std::isfinite(widened(x[i]));
  return fine;
}

// The other way round: tokens of row, column, channel, of which the first channels are taken.
inline void scatter_pixels(const float* pixels, float* out, const DitSizes& sizes, int64_t height, int64_t width,
                           const int32_t* ids, int64_t begin, int64_t end) {
  const int64_t patch = sizes.patch, across = width / patch;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = ids == nullptr ? i : ids[i];
    const float* from = pixels + i * patch * patch * sizes.out_channels;
    float* corner = out + token / across * patch * width + token % across * patch;
    for (int64_t row = 0; row < patch; ++row) {
      for (int64_t column = 0; column < patch; ++column, from += sizes.out_channels) {
        for (int64_t c = 0; c < sizes.channels; ++c) corner[(c * height + row) * width + column] = from[c];
      }
    }
  }
}

}  // namespace vivace
