// Vectorised noise; every line repeats one of engine/noise.py, operation by operation.

namespace vivace::VV_NAMESPACE {

struct NoiseKey {
  uint32_t seed_low, seed_high, picture, draw;
};

// Words of kLanes counters that start at `counter`: w[q] holds word q of each.
VV_INLINE void philox_block(const NoiseKey& key, uint32_t counter, U w[4]) {
  U c0 = set1u(counter) + counter_lanes(), c1 = set1u(0), c2 = set1u(key.picture), c3 = set1u(key.draw);
  uint32_t key0 = key.seed_low, key1 = key.seed_high;
  const U m0 = set1u(0xD2511F53u), m1 = set1u(0xCD9E8D57u);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    U high0, low0, high1, low1;
    mul_wide(c0, m0, high0, low0);
    mul_wide(c2, m1, high1, low1);
    c0 = high1 ^ c1 ^ set1u(key0);
    c1 = low1;
    c2 = high0 ^ c3 ^ set1u(key1);
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
}

VV_INLINE F uniform(U word) { return to_float_unsigned(word) * set1(0x1p-32f) + set1(0x1p-33f); }

VV_INLINE F log_uniform(U word) {
  const U u = bits(uniform(word));
  const U shift = shift_right_signed<23>(u - set1u(0x3F3504F3u));
  const F e = to_float_signed(shift);
  const F x = from_bits(u - shift_left<23>(shift)) - set1(1.0f);
  const F z = x * x;
  F p = x * set1(-0x1.38b4ccp-4f) + set1(0x1.055b46p-3f);
  p = p * x + set1(-0x1.0d8552p-3f);
  p = p * x + set1(0x1.22da22p-3f);
  p = p * x + set1(-0x1.547244p-3f);
  p = p * x + set1(0x1.99a008p-3f);
  p = p * x + set1(-0x1.000228p-2f);
  p = p * x + set1(0x1.555554p-2f);
  F y = (x * z) * p;
  y = y - z * set1(0.5f);
  y = y + e * set1(-0x1.bd0106p-13f);
  y = y + x;
  return y + e * set1(0x1.63p-1f);
}

VV_INLINE void cos_sin_turns(U word, F& cosine, F& sine) {
  const U nearest = shift_right<1>(shift_right<29>(word) + set1u(1));
  const F f = uniform(word) * set1(4.0f) - to_float_signed(nearest);
  const F z = f * f;
  F s = z * set1(-0x1.2d9bb8p-8f) + set1(0x1.465ec6p-4f);
  s = s * z + set1(-0x1.4abbbap-1f);
  s = s * z + set1(0x1.921fb6p+0f);
  s = f * s;
  F c = z * set1(0x1.d9f7bap-11f) + set1(-0x1.55c664p-6f);
  c = c * z + set1(0x1.03c1dep-2f);
  c = c * z + set1(-0x1.3bd3ccp+0f);
  c = z * c + set1(1.0f);
  const U two = set1u(2);
  cosine = from_bits(bits(select_odd(nearest, c, s)) ^ shift_left<30>((nearest + set1u(1)) & two));
  sine = from_bits(bits(select_odd(nearest, s, c)) ^ shift_left<30>(nearest & two));
}

VV_INLINE void box_muller(U w0, U w1, F& n0, F& n1) {
  const F radius = sqrt(log_uniform(w0) * set1(-2.0f));
  F cosine, sine;
  cos_sin_turns(w1, cosine, sine);
  n0 = radius * cosine;
  n1 = radius * sine;
}

// Normals of elements element .. element + kBlock - 1, in order; element is a multiple of 4. Not inlined into every
// template of the solver step: it is long, and a call a block costs nothing beside it.
static __attribute__((noinline)) void normal_block(const NoiseKey& key, int64_t element, F n[4]) {
  U w[4];
  philox_block(key, static_cast<uint32_t>(element >> 2), w);
  box_muller(w[0], w[1], n[0], n[1]);
  box_muller(w[2], w[3], n[2], n[3]);
  interleave4(n[0], n[1], n[2], n[3]);
}

static void normal_span(float* out, int64_t begin, int64_t end, uint64_t seed, uint32_t picture, uint32_t draw) {
  const NoiseKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), picture, draw};
  F n[4];
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    normal_block(key, i, n);
    for (int v = 0; v < kVectors; ++v) store(out + i + v * kLanes, n[v]);
  }
  if (i < end) {
    float last[kBlock];
    normal_block(key, i, n);
    for (int v = 0; v < kVectors; ++v) store(last + v * kLanes, n[v]);
    memcpy(out + i, last, static_cast<size_t>(end - i) * sizeof(float));
  }
}

}  // namespace vivace::VV_NAMESPACE
