// Unit normals by counter: Philox4x32-10 words, Box-Muller in float32; the same bits as vivace.engine.noise, whose
// docstring is the definition. Compile with -ffp-contract=off: every product and sum is rounded on its own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace noise {

inline void philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * counter[0], p1 = 0xCD9E8D57ull * counter[2];
    const uint32_t c1 = counter[1], c3 = counter[3];
    counter[0] = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    counter[1] = static_cast<uint32_t>(p1);
    counter[2] = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    counter[3] = static_cast<uint32_t>(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

inline float uniform(uint32_t word) { return static_cast<float>(word) * 0x1p-32f + 0x1p-33f; }  // in (0, 1]

template <int N>
float horner(float x, const float (&coefficients)[N]) {
  float acc = coefficients[N - 1];
  for (int i = N - 2; i >= 0; --i) acc = acc * x + coefficients[i];
  return acc;
}

inline float log_uniform(uint32_t word) {
  static const float poly[] = {0x1.555554p-2f, -0x1.000228p-2f, 0x1.99a008p-3f, -0x1.547244p-3f,
                               0x1.22da22p-3f, -0x1.0d8552p-3f, 0x1.055b46p-3f, -0x1.38b4ccp-4f};
  const float u = uniform(word);
  int32_t bits;
  std::memcpy(&bits, &u, 4);
  const int32_t shift = (bits - 0x3F3504F3) >> 23;  // mantissas in [1/sqrt(2), sqrt(2))
  bits -= shift * (1 << 23);
  float x;
  std::memcpy(&x, &bits, 4);
  x -= 1.0f;
  const float e = static_cast<float>(shift), z = x * x;
  float y = (x * z) * horner(x, poly);
  y -= z * 0.5f;
  y += e * -0x1.bd0106p-13f;
  y += x;
  y += e * 0x1.63p-1f;
  return y;
}

inline void cos_sin_turns(uint32_t word, float& cosine, float& sine) {
  static const float sines[] = {0x1.921fb6p+0f, -0x1.4abbbap-1f, 0x1.465ec6p-4f, -0x1.2d9bb8p-8f};
  static const float cosines[] = {-0x1.3bd3ccp+0f, 0x1.03c1dep-2f, -0x1.55c664p-6f, 0x1.d9f7bap-11f};
  const uint32_t nearest = ((word >> 29) + 1) >> 1;  // quarter turns, 0..4
  const float f = uniform(word) * 4.0f - static_cast<float>(nearest), z = f * f;
  const float s = f * horner(z, sines), c = z * horner(z, cosines) + 1.0f;
  cosine = nearest & 1 ? s : c;
  sine = nearest & 1 ? c : s;
  if ((nearest + 1) & 2) cosine = -cosine;
  if (nearest & 2) sine = -sine;
}

// Draw `draw` of picture `picture`: `count` unit normals.
inline std::vector<float> normals(size_t count, uint64_t seed, uint32_t picture, uint32_t draw) {
  std::vector<float> out((count + 3) / 4 * 4);
  for (uint64_t block = 0; 4 * block < out.size(); ++block) {
    uint32_t words[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), picture, draw};
    philox(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    for (int pair = 0; pair < 4; pair += 2) {
      const float radius = std::sqrt(log_uniform(words[pair]) * -2.0f);
      float cosine, sine;
      cos_sin_turns(words[pair + 1], cosine, sine);
      out[4 * block + pair] = radius * cosine;
      out[4 * block + pair + 1] = radius * sine;
    }
  }
  out.resize(count);
  return out;
}

}  // namespace noise
