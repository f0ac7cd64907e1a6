// One lane: the oracle of the other instruction sets, and the only one on machines other than x86-64.
#pragma once

namespace vivace::scalar {

constexpr int kLanes = 1;
struct F {
  float x;
};
struct U {
  uint32_t x;
};

VV_INLINE F set1(float x) { return {x}; }
VV_INLINE U set1u(uint32_t x) { return {x}; }
VV_INLINE U bits(F a) {
  U r;
  memcpy(&r, &a, 4);
  return r;
}
VV_INLINE F from_bits(U a) {
  F r;
  memcpy(&r, &a, 4);
  return r;
}

VV_INLINE F operator+(F a, F b) { return {a.x + b.x}; }
VV_INLINE F operator-(F a, F b) { return {a.x - b.x}; }
VV_INLINE F operator*(F a, F b) { return {a.x * b.x}; }
// a * b + c, rounded once.
VV_INLINE F fma(F a, F b, F c) { return {__builtin_fmaf(a.x, b.x, c.x)}; }
VV_INLINE float sum_lanes(F a) { return a.x; }
// A NaN may be left out.
VV_INLINE float max_lanes(F a) { return a.x; }
VV_INLINE F operator/(F a, F b) { return {a.x / b.x}; }
VV_INLINE F sqrt(F a) { return {__builtin_sqrtf(a.x)}; }
// b where one is a NaN.
VV_INLINE F max(F a, F b) { return {a.x > b.x ? a.x : b.x}; }
// y limited to [low, high]; a NaN passes through, as x86 min and max return their second operand then.
VV_INLINE F clamp(F y, F low, F high) {
  F t = {low.x > y.x ? low.x : y.x};
  return {high.x < t.x ? high.x : t.x};
}

VV_INLINE U operator+(U a, U b) { return {a.x + b.x}; }
VV_INLINE U operator-(U a, U b) { return {a.x - b.x}; }
VV_INLINE U operator&(U a, U b) { return {a.x & b.x}; }
VV_INLINE U operator^(U a, U b) { return {a.x ^ b.x}; }
VV_INLINE U min(U a, U b) { return {a.x < b.x ? a.x : b.x}; }
VV_INLINE U max(U a, U b) { return {a.x > b.x ? a.x : b.x}; }
VV_INLINE uint32_t max_lanes(U a) { return a.x; }
VV_INLINE bool any_below(U a, uint32_t limit) { return a.x < limit; }
template <int N>
VV_INLINE U shift_left(U a) {
  return {a.x << N};
}
template <int N>
VV_INLINE U shift_right(U a) {
  return {a.x >> N};
}
template <int N>
VV_INLINE U shift_right_signed(U a) {
  return {static_cast<uint32_t>(static_cast<int32_t>(a.x) >> N)};
}
VV_INLINE void mul_wide(U a, U b, U& high, U& low) {
  const uint64_t product = static_cast<uint64_t>(a.x) * b.x;
  high = {static_cast<uint32_t>(product >> 32)};
  low = {static_cast<uint32_t>(product)};
}
VV_INLINE F to_float_signed(U a) { return {static_cast<float>(static_cast<int32_t>(a.x))}; }
VV_INLINE F to_float_unsigned(U a) { return {static_cast<float>(a.x)}; }
// a where the lowest bit of `odd` is 0, else b.
VV_INLINE F select_odd(U odd, F a, F b) { return (odd.x & 1) ? b : a; }

// Lanes 2i and 2i + 1 of sixteen change places.
VV_INLINE void swap_pairs16(F v[16 / kLanes]) {
  for (int l = 0; l < 16; l += 2) {
    const F even = v[l];
    v[l] = v[l + 1];
    v[l + 1] = even;
  }
}

// Rows to columns of a square of kLanes x kLanes.
VV_INLINE void transpose(F*) {}

VV_INLINE F load(const float* p) { return {*p}; }
VV_INLINE F load_bf16(const uint16_t* p) { return from_bits({static_cast<uint32_t>(*p) << 16}); }
VV_INLINE F load_f16(const uint16_t* p) {
  const uint32_t sign = (*p & 0x8000u) << 16, body = *p & 0x7fffu;
  if (body > 0x7c00u) return from_bits({sign | 0x7fc00000u | body << 13});  // a NaN becomes quiet, as in hardware
  if (body == 0x7c00u) return from_bits({sign | 0x7f800000u});
  if (body >= 0x0400u) return from_bits({sign | ((body << 13) + (112u << 23))});
  const F tiny = {static_cast<float>(body) * 0x1p-24f};  // subnormal: exact in float32
  return from_bits({sign | bits(tiny).x});
}

VV_INLINE void store(float* p, F a) { *p = a.x; }
VV_INLINE void stream(float* p, F a) { *p = a.x; }
VV_INLINE void store_bf16(uint16_t* p, F a) {
  const uint32_t x = bits(a).x;
  const bool nan = (x & 0x7fffffffu) > 0x7f800000u;
  *p = static_cast<uint16_t>(nan ? (x >> 16) | 0x40u : (x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
}
// Two neighbours a lane, the first in the lower half.
VV_INLINE U load_words(const uint16_t* p) {
  U r;
  memcpy(&r, p, 4);
  return r;
}
// Elements 2i and 2i + 1 of 2 kLanes, in one vector each: cheaper where their order does not matter. A NaN to be stored
// must have come from bfloat16 or from hardware: its lower half is 0, and rounding does not reach its sign.
VV_INLINE void load_pairs_bf16(const uint16_t* p, F& even, F& odd) { even = load_bf16(p), odd = load_bf16(p + 1); }
VV_INLINE void store_pairs_bf16(uint16_t* p, F even, F odd) { store_bf16(p, even), store_bf16(p + 1, odd); }
// A byte a lane, without and with sign.
VV_INLINE U load_bytes(const uint8_t* p) { return {*p}; }
VV_INLINE U load_bytes(const int8_t* p) { return {static_cast<uint32_t>(static_cast<int32_t>(*p))}; }
// The lowest byte of every lane.
VV_INLINE void store_bytes(int8_t* p, U a) { *p = static_cast<int8_t>(static_cast<uint8_t>(a.x)); }
VV_INLINE void stream_bf16(uint16_t* p, F a) { store_bf16(p, a); }
VV_INLINE void store_f16(uint16_t* p, F a) {
  const uint32_t x = bits(a).x, sign = (x >> 16) & 0x8000u, body = x & 0x7fffffffu;
  uint32_t half;
  if (body > 0x7f800000u) {
    half = 0x7e00u | ((body >> 13) & 0x3ffu);
  } else if (body >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (body >= 0x38800000u) {  // normal: rebias, round to nearest even
    half = (body - (112u << 23) + 0xfffu + ((body >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 1/2 puts units of 2^-24 into the lowest bits, rounded by the addition
    half = bits(from_bits({body}) + set1(0.5f)).x - 0x3f000000u;
  }
  *p = static_cast<uint16_t>(sign | half);
}
VV_INLINE void stream_f16(uint16_t* p, F a) { store_f16(p, a); }
VV_INLINE void stream_fence() {}

// Counter that lane 0, 1, ... of a noise block works on, so that interleave4 leaves normals in order.
VV_INLINE U counter_lanes() { return {0}; }
VV_INLINE void interleave4(F&, F&, F&, F&) {}

}  // namespace vivace::scalar
