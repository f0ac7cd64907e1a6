// The definitions once more, element by element in plain C++: what the kernels are compared with, bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "ops/solver_step.h"

namespace vivace::test {

inline uint32_t bits(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}

inline float from_bits(uint32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

// Bit for bit, but a NaN is a NaN.
inline bool same(float a, float b) { return bits(a) == bits(b) || (a != a && b != b); }

// --- half types: values from bits, and rounding to nearest even through double
// -----------------------------------------
inline float half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  float value = std::numeric_limits<float>::quiet_NaN();
  if (exponent == 31 && fraction == 0) value = INFINITY;
  if (exponent < 31)
    value = std::ldexp(static_cast<float>(fraction + (exponent ? 1024 : 0)), (exponent ? exponent : 1) - 25);
  return std::copysign(value, h >> 15 ? -1.0f : 1.0f);
}

inline float widen(uint16_t h, Dtype dtype) {
  return dtype == Dtype::kBfloat16 ? from_bits(static_cast<uint32_t>(h) << 16) : half_value(h);
}

// `x` rounded to a float of `digits` bits and exponents from `low` to `high`.
inline float rounded(float x, int digits, int low, int high) {
  if (x == 0.0f || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), low) - (digits - 1);
  const double value = std::ldexp(std::nearbyint(std::ldexp(static_cast<double>(x), -exponent)), exponent);
  return std::fabs(value) >= std::ldexp(1.0, high + 1) ? std::copysign(INFINITY, x)
                                                       : std::copysign(static_cast<float>(std::fabs(value)), x);
}

inline float stored(float x, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return x;
  return dtype == Dtype::kBfloat16 ? rounded(x, 8, -126, 127) : rounded(x, 11, -14, 15);
}

// --- noise: engine/noise.py for one element --------------------------------------------------------------------------
inline void philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{counter[0]} * 0xD2511F53u, p1 = uint64_t{counter[2]} * 0xCD9E8D57u;
    counter[0] = static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key0;
    counter[1] = static_cast<uint32_t>(p1);
    counter[2] = static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key1;
    counter[3] = static_cast<uint32_t>(p0);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
}

inline float uniform(uint32_t word) { return static_cast<float>(word) * 0x1p-32f + 0x1p-33f; }

inline float horner(float x, const float* coefficients, int count) {
  float value = coefficients[0];
  for (int i = 1; i < count; ++i) value = value * x + coefficients[i];
  return value;
}

inline float log_uniform(uint32_t word) {
  static const float log_poly[] = {-0x1.38b4ccp-4f, 0x1.055b46p-3f, -0x1.0d8552p-3f, 0x1.22da22p-3f,
                                   -0x1.547244p-3f, 0x1.99a008p-3f, -0x1.000228p-2f, 0x1.555554p-2f};
  const uint32_t u = bits(uniform(word));
  const int shift = static_cast<int>(std::floor((static_cast<int64_t>(u) - 0x3F3504F3) / 8388608.0));
  const float x = from_bits(u - static_cast<uint32_t>(shift) * 8388608u) - 1.0f, z = x * x,
              e = static_cast<float>(shift);
  float y = (x * z) * horner(x, log_poly, 8);
  y = y - z * 0.5f;
  y = y + e * -0x1.bd0106p-13f;
  y = y + x;
  return y + e * 0x1.63p-1f;
}

inline float normal(uint64_t seed, uint32_t picture, uint32_t draw, int64_t element) {
  static const float sin_poly[] = {-0x1.2d9bb8p-8f, 0x1.465ec6p-4f, -0x1.4abbbap-1f, 0x1.921fb6p+0f};
  static const float cos_poly[] = {0x1.d9f7bap-11f, -0x1.55c664p-6f, 0x1.03c1dep-2f, -0x1.3bd3ccp+0f};
  const auto block = static_cast<uint64_t>(element >> 2);
  uint32_t w[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), picture, draw};
  philox(w, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint32_t *pair = w + (element & 2), quarter = ((pair[1] >> 29) + 1) >> 1;
  const float f = uniform(pair[1]) * 4.0f - static_cast<float>(quarter), z = f * f;
  const float s = f * horner(z, sin_poly, 4), c = z * horner(z, cos_poly, 4) + 1.0f;
  const bool sine = element & 1, negative = (sine ? quarter : quarter + 1) & 2;
  const float turn = ((quarter & 1) != 0) == sine ? c : s;
  return std::sqrt(log_uniform(pair[0]) * -2.0f) * from_bits(bits(turn) ^ (negative ? 0x80000000u : 0u));
}

// --- the solver step -------------------------------------------------------------------------------------------------
// Whether a row is legal for a call; terms without a coefficient are not looked at.
inline bool legal(const SolverStepArgs& a, int64_t row) {
  const int32_t* ints = a.ints + row * kIntColumns;
  const float* coef = a.floats + row * kFloatColumns;
  const int32_t sources = ints[0], outputs = ints[1];
  if (sources < 0 || sources > kMaxSources || outputs < 0 || outputs > kMaxOutputs) return false;
  const int32_t adjusted = ints[kAdjustedColumn];
  if (ints[kKindColumn] != kUpdate || adjusted < 0 || adjusted >= 1 << outputs) return false;
  if (adjusted != 0 && a.adjust == nullptr) return false;
  const auto place = [&](int32_t c) {
    return (c >= 0 && c < a.slots) || (c >= kTensorCode && c < kTensorCode + a.tensor_count);
  };
  for (int j = 0; j < sources; ++j) {
    bool used = false;
    for (int k = 0; k < outputs; ++k) used = used || coef[k * kMaxSources + j] != 0.0f;
    const int32_t source = ints[kSourceColumn + j], scale = ints[kScaleColumn + j];
    const bool known = place(source) || source == kOneCode || (source >= kOutCode && source < kOutCode + a.branches) ||
                       (source >= kNoiseCode && a.seeds != nullptr && a.pictures != nullptr);
    if (used && (!known || !(scale == -1 || place(scale)))) return false;
  }
  for (int k = 0; k < outputs; ++k) {
    const int32_t to = ints[kDestinationColumn + k];
    if (!(to >= 0 && to < a.slots) && !(to == kNetCode && a.net != nullptr)) return false;
    for (int l = 0; l < k; ++l) {
      if (ints[kDestinationColumn + l] == to) return false;
    }
  }
  return true;
}

// y[0..outputs) of element e of sample b, before rounding to the dtype of the destination.
inline void combine(const SolverStepArgs& a, int64_t b, int64_t e, float* y) {
  const int64_t row = a.rows[b], lane = a.index[b];
  const int32_t* ints = a.ints + row * kIntColumns;
  const float* floats = a.floats + row * kFloatColumns;
  const auto plane = [&](int32_t c) {
    return c < kOutCode ? a.pool[(c * a.capacity + lane) * a.numel + e] : a.tensors[c - kTensorCode][e];
  };
  const auto read = [&](int32_t c) {
    if (c == kOneCode) return 1.0f;
    if (c >= kNoiseCode) {
      return normal(static_cast<uint64_t>(a.seeds[b]), static_cast<uint32_t>(a.pictures[b]),
                    static_cast<uint32_t>(c - kNoiseCode), e);
    }
    if (c < kOutCode || c >= kTensorCode) return plane(c);
    const Branch& out = a.outs[c - kOutCode];
    const int64_t at = b * out.stride + e;
    return out.dtype == Dtype::kFloat32 ? static_cast<const float*>(out.data)[at]
                                        : widen(static_cast<const uint16_t*>(out.data)[at], out.dtype);
  };
  for (int k = 0; k < ints[1]; ++k) {
    bool empty = true;
    float sum = 0.0f;
    const auto add = [&](float coef, float value) {
      const float product = coef * value;
      sum = empty ? product : sum + product;
      empty = false;
    };
    for (int j = 0; j < ints[0]; ++j) {
      const float coef = floats[k * kMaxSources + j];
      const int32_t scale = ints[kScaleColumn + j];
      if (coef == 0.0f) continue;
      const float value = read(ints[kSourceColumn + j]);
      add(coef, scale == -1 ? value : value * plane(scale));
    }
    for (int l = 0; l < k; ++l) {
      const float prev = floats[kPrevColumn + k * kMaxOutputs + l];
      if (prev != 0.0f) add(prev, y[l]);
    }
    const bool adjusted = ints[kAdjustedColumn] >> k & 1;
    const float low = adjusted ? a.adjust[3 * b] : floats[kLowColumn + k];
    const float high = adjusted ? a.adjust[3 * b + 1] : floats[kHighColumn + k];
    if (ints[kKindColumn] == kUpdate) {  // a reduction row keeps its parameters there
      sum = low > sum ? low : sum;
      sum = high < sum ? high : sum;
    }
    y[k] = adjusted ? sum * a.adjust[3 * b + 2] : sum;
  }
}

}  // namespace vivace::test
