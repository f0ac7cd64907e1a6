// Sixteen lanes: AVX-512F alone, for both sets that have it. vcvtneps2bf16 is not used: it flushes subnormals, the
// other sets do not.
#pragma once

#include <immintrin.h>

namespace vivace::VV_NAMESPACE {

constexpr int kLanes = 16;
struct F {
  __m512 x;
};
struct U {
  __m512i x;
};

VV_INLINE F set1(float x) { return {_mm512_set1_ps(x)}; }
VV_INLINE U set1u(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
VV_INLINE U bits(F a) { return {_mm512_castps_si512(a.x)}; }
VV_INLINE F from_bits(U a) { return {_mm512_castsi512_ps(a.x)}; }

VV_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.x, b.x)}; }
VV_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.x, b.x)}; }
VV_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.x, b.x)}; }
VV_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
// Sum of the lanes in a tree: lane l and lane l + half of what is left are added, half = kLanes / 2, ..., 1.
VV_INLINE float sum_lanes(F a) {
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.x), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.x), upper);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
VV_INLINE float max_lanes(F a) { return _mm512_reduce_max_ps(a.x); }
VV_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.x, b.x)}; }
VV_INLINE F sqrt(F a) { return {_mm512_sqrt_ps(a.x)}; }
VV_INLINE F max(F a, F b) { return {_mm512_max_ps(a.x, b.x)}; }
VV_INLINE F clamp(F y, F low, F high) { return {_mm512_min_ps(high.x, _mm512_max_ps(low.x, y.x))}; }

VV_INLINE U operator+(U a, U b) { return {_mm512_add_epi32(a.x, b.x)}; }
VV_INLINE U operator-(U a, U b) { return {_mm512_sub_epi32(a.x, b.x)}; }
VV_INLINE U operator&(U a, U b) { return {_mm512_and_si512(a.x, b.x)}; }
VV_INLINE U operator^(U a, U b) { return {_mm512_xor_si512(a.x, b.x)}; }
VV_INLINE U min(U a, U b) { return {_mm512_min_epu32(a.x, b.x)}; }
VV_INLINE U max(U a, U b) { return {_mm512_max_epu32(a.x, b.x)}; }
VV_INLINE uint32_t max_lanes(U a) { return _mm512_reduce_max_epu32(a.x); }
VV_INLINE bool any_below(U a, uint32_t limit) { return _mm512_cmplt_epu32_mask(a.x, set1u(limit).x) != 0; }
template <int N>
VV_INLINE U shift_left(U a) {
  return {_mm512_slli_epi32(a.x, N)};
}
template <int N>
VV_INLINE U shift_right(U a) {
  return {_mm512_srli_epi32(a.x, N)};
}
template <int N>
VV_INLINE U shift_right_signed(U a) {
  return {_mm512_srai_epi32(a.x, N)};
}
VV_INLINE void mul_wide(U a, U b, U& high, U& low) {
  const __m512i even = _mm512_mul_epu32(a.x, b.x);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.x, 32), _mm512_srli_epi64(b.x, 32));
  high = {_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)};
  low = {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
}
VV_INLINE F to_float_signed(U a) { return {_mm512_cvtepi32_ps(a.x)}; }
VV_INLINE F to_float_unsigned(U a) { return {_mm512_cvtepu32_ps(a.x)}; }
VV_INLINE F select_odd(U odd, F a, F b) {
  return {_mm512_mask_blend_ps(_mm512_test_epi32_mask(odd.x, _mm512_set1_epi32(1)), a.x, b.x)};
}

VV_INLINE void swap_pairs16(F v[16 / kLanes]) { v[0] = {_mm512_permute_ps(v[0].x, 0xb1)}; }

VV_INLINE void transpose(F v[16]) {
  __m512d two[16];
  for (int i = 0; i < 16; i += 2) {
    two[i] = _mm512_castps_pd(_mm512_unpacklo_ps(v[i].x, v[i + 1].x));
    two[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(v[i].x, v[i + 1].x));
  }
  __m512 four[16];  // [4 q + c]: rows 4 q .. 4 q + 3 of columns c, 4 + c, 8 + c, 12 + c
  for (int i = 0; i < 16; i += 4) {
    four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(two[i], two[i + 2]));
    four[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(two[i], two[i + 2]));
    four[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(two[i + 1], two[i + 3]));
    four[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(two[i + 1], two[i + 3]));
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even0 = _mm512_shuffle_f32x4(four[c], four[4 + c], 0x88);
    const __m512 even1 = _mm512_shuffle_f32x4(four[8 + c], four[12 + c], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(four[c], four[4 + c], 0xdd);
    const __m512 odd1 = _mm512_shuffle_f32x4(four[8 + c], four[12 + c], 0xdd);
    v[c] = {_mm512_shuffle_f32x4(even0, even1, 0x88)};
    v[4 + c] = {_mm512_shuffle_f32x4(odd0, odd1, 0x88)};
    v[8 + c] = {_mm512_shuffle_f32x4(even0, even1, 0xdd)};
    v[12 + c] = {_mm512_shuffle_f32x4(odd0, odd1, 0xdd)};
  }
}

VV_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
VV_INLINE __m256i load_half(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
VV_INLINE F load_bf16(const uint16_t* p) {
  return from_bits({_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(p)), 16)});
}
VV_INLINE F load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(load_half(p))}; }

VV_INLINE __m256i to_f16(F a) { return _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VV_INLINE __m256i to_bf16(F a) {
  const U x = bits(a);
  const U rounded = shift_right<16>(x + set1u(0x7fffu) + (shift_right<16>(x) & set1u(1)));
  const __m512i quiet = _mm512_or_si512(shift_right<16>(x).x, set1u(0x40u).x);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded.x, quiet));
}
VV_INLINE void store_half(uint16_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
VV_INLINE void stream_half(uint16_t* p, __m256i x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), x); }

VV_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.x); }
VV_INLINE void stream(float* p, F a) { _mm512_stream_ps(p, a.x); }
VV_INLINE void store_bf16(uint16_t* p, F a) { store_half(p, to_bf16(a)); }
VV_INLINE U load_words(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
VV_INLINE void load_pairs_bf16(const uint16_t* p, F& even, F& odd) {
  const U both = {_mm512_loadu_si512(p)};
  even = from_bits(shift_left<16>(both));
  odd = from_bits(both & set1u(0xffff0000u));
}
VV_INLINE U round_to_bf16(F a) {
  const U x = bits(a);
  return x + set1u(0x7fffu) + (shift_right<16>(x) & set1u(1));
}
VV_INLINE void store_pairs_bf16(uint16_t* p, F even, F odd) {
  const U both = shift_right<16>(round_to_bf16(even)) ^ (round_to_bf16(odd) & set1u(0xffff0000u));
  _mm512_storeu_si512(p, both.x);
}
VV_INLINE U load_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
VV_INLINE U load_bytes(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
VV_INLINE void store_bytes(int8_t* p, U a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.x));
}
VV_INLINE void stream_bf16(uint16_t* p, F a) { stream_half(p, to_bf16(a)); }
VV_INLINE void store_f16(uint16_t* p, F a) { store_half(p, to_f16(a)); }
VV_INLINE void stream_f16(uint16_t* p, F a) { stream_half(p, to_f16(a)); }
VV_INLINE void stream_fence() { _mm_sfence(); }

// Lane 4h + q works on counter 4q + h, so that a transpose inside 128-bit quarters leaves normals in order.
VV_INLINE U counter_lanes() { return {_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)}; }
VV_INLINE void interleave4(F& a, F& b, F& c, F& d) {
  const __m512d ab0 = _mm512_castps_pd(_mm512_unpacklo_ps(a.x, b.x)),
                ab1 = _mm512_castps_pd(_mm512_unpackhi_ps(a.x, b.x));
  const __m512d cd0 = _mm512_castps_pd(_mm512_unpacklo_ps(c.x, d.x)),
                cd1 = _mm512_castps_pd(_mm512_unpackhi_ps(c.x, d.x));
  a = {_mm512_castpd_ps(_mm512_unpacklo_pd(ab0, cd0))};
  b = {_mm512_castpd_ps(_mm512_unpackhi_pd(ab0, cd0))};
  c = {_mm512_castpd_ps(_mm512_unpacklo_pd(ab1, cd1))};
  d = {_mm512_castpd_ps(_mm512_unpackhi_pd(ab1, cd1))};
}

}  // namespace vivace::VV_NAMESPACE
