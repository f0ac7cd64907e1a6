// Eight lanes: AVX2 and F16C; FMA only where fma() asks for it.
#pragma once

#include <immintrin.h>

namespace vivace::avx2 {

constexpr int kLanes = 8;
struct F {
  __m256 x;
};
struct U {
  __m256i x;
};

VV_INLINE F set1(float x) { return {_mm256_set1_ps(x)}; }
VV_INLINE U set1u(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
VV_INLINE U bits(F a) { return {_mm256_castps_si256(a.x)}; }
VV_INLINE F from_bits(U a) { return {_mm256_castsi256_ps(a.x)}; }

VV_INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.x, b.x)}; }
VV_INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.x, b.x)}; }
VV_INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.x, b.x)}; }
VV_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
// Sum of the lanes in a tree: lane l and lane l + half of what is left are added, half = kLanes / 2, ..., 1.
VV_INLINE float sum_lanes(F a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
VV_INLINE float max_lanes(F a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
VV_INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.x, b.x)}; }
VV_INLINE F sqrt(F a) { return {_mm256_sqrt_ps(a.x)}; }
VV_INLINE F max(F a, F b) { return {_mm256_max_ps(a.x, b.x)}; }
VV_INLINE F clamp(F y, F low, F high) { return {_mm256_min_ps(high.x, _mm256_max_ps(low.x, y.x))}; }

VV_INLINE U operator+(U a, U b) { return {_mm256_add_epi32(a.x, b.x)}; }
VV_INLINE U operator-(U a, U b) { return {_mm256_sub_epi32(a.x, b.x)}; }
VV_INLINE U operator&(U a, U b) { return {_mm256_and_si256(a.x, b.x)}; }
VV_INLINE U operator^(U a, U b) { return {_mm256_xor_si256(a.x, b.x)}; }
VV_INLINE U min(U a, U b) { return {_mm256_min_epu32(a.x, b.x)}; }
VV_INLINE U max(U a, U b) { return {_mm256_max_epu32(a.x, b.x)}; }
VV_INLINE uint32_t max_lanes(U a) {
  const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(a.x), _mm256_extracti128_si256(a.x, 1));
  const __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0xb1))));
}
VV_INLINE bool any_below(U a, uint32_t limit) {  // limit > 0
  return _mm256_movemask_epi8(_mm256_cmpeq_epi32(min(a, set1u(limit - 1)).x, a.x)) != 0;
}
template <int N>
VV_INLINE U shift_left(U a) {
  return {_mm256_slli_epi32(a.x, N)};
}
template <int N>
VV_INLINE U shift_right(U a) {
  return {_mm256_srli_epi32(a.x, N)};
}
template <int N>
VV_INLINE U shift_right_signed(U a) {
  return {_mm256_srai_epi32(a.x, N)};
}
VV_INLINE void mul_wide(U a, U b, U& high, U& low) {
  const __m256i even = _mm256_mul_epu32(a.x, b.x);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.x, 32), _mm256_srli_epi64(b.x, 32));
  high = {_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)};
  low = {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
}
VV_INLINE F to_float_signed(U a) { return {_mm256_cvtepi32_ps(a.x)}; }
// Two exact halves and one rounded addition: the same as one rounded conversion.
VV_INLINE F to_float_unsigned(U a) {
  const F high = to_float_signed(shift_right<16>(a)) * set1(65536.0f);
  return high + to_float_signed(a & set1u(0xffffu));
}
VV_INLINE F select_odd(U odd, F a, F b) {
  return {_mm256_blendv_ps(a.x, b.x, _mm256_castsi256_ps(_mm256_slli_epi32(odd.x, 31)))};
}

VV_INLINE void swap_pairs16(F v[16 / kLanes]) {
  v[0] = {_mm256_permute_ps(v[0].x, 0xb1)};
  v[1] = {_mm256_permute_ps(v[1].x, 0xb1)};
}

VV_INLINE void transpose(F v[8]) {
  __m256d two[8];
  for (int i = 0; i < 8; i += 2) {
    two[i] = _mm256_castps_pd(_mm256_unpacklo_ps(v[i].x, v[i + 1].x));
    two[i + 1] = _mm256_castps_pd(_mm256_unpackhi_ps(v[i].x, v[i + 1].x));
  }
  __m256 four[8];  // [4 q + c]: rows 4 q .. 4 q + 3 of columns c, 4 + c
  for (int i = 0; i < 8; i += 4) {
    four[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(two[i], two[i + 2]));
    four[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(two[i], two[i + 2]));
    four[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(two[i + 1], two[i + 3]));
    four[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(two[i + 1], two[i + 3]));
  }
  for (int c = 0; c < 4; ++c) {
    v[c] = {_mm256_permute2f128_ps(four[c], four[4 + c], 0x20)};
    v[4 + c] = {_mm256_permute2f128_ps(four[c], four[4 + c], 0x31)};
  }
}

VV_INLINE F load(const float* p) { return {_mm256_loadu_ps(p)}; }
VV_INLINE __m128i load_half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
VV_INLINE F load_bf16(const uint16_t* p) {
  return from_bits({_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16)});
}
VV_INLINE F load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load_half(p))}; }

VV_INLINE __m128i to_f16(F a) { return _mm256_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VV_INLINE __m128i to_bf16(F a) {
  const U x = bits(a);
  const U rounded = shift_right<16>(x + set1u(0x7fffu) + (shift_right<16>(x) & set1u(1)));
  const __m256i quiet = _mm256_or_si256(shift_right<16>(x).x, set1u(0x40u).x);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded.x, quiet, nan);
  const __m256i packed = _mm256_packus_epi32(words, words);  // within 128-bit halves
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
VV_INLINE void store_half(uint16_t* p, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); }
VV_INLINE void stream_half(uint16_t* p, __m128i x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), x); }

VV_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a.x); }
VV_INLINE void stream(float* p, F a) { _mm256_stream_ps(p, a.x); }
VV_INLINE void store_bf16(uint16_t* p, F a) { store_half(p, to_bf16(a)); }
VV_INLINE U load_words(const uint16_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
VV_INLINE void load_pairs_bf16(const uint16_t* p, F& even, F& odd) {
  const U both = {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  even = from_bits(shift_left<16>(both));
  odd = from_bits(both & set1u(0xffff0000u));
}
VV_INLINE U round_to_bf16(F a) {
  const U x = bits(a);
  return x + set1u(0x7fffu) + (shift_right<16>(x) & set1u(1));
}
VV_INLINE void store_pairs_bf16(uint16_t* p, F even, F odd) {
  const U both = shift_right<16>(round_to_bf16(even)) ^ (round_to_bf16(odd) & set1u(0xffff0000u));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both.x);
}
VV_INLINE U load_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
VV_INLINE U load_bytes(const int8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
VV_INLINE void store_bytes(int8_t* p, U a) {
  const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i fours = _mm256_shuffle_epi8(a.x, bytes);  // four bytes at the bottom of each 128-bit half
  const __m128i eight = _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), eight);
}
VV_INLINE void stream_bf16(uint16_t* p, F a) { stream_half(p, to_bf16(a)); }
VV_INLINE void store_f16(uint16_t* p, F a) { store_half(p, to_f16(a)); }
VV_INLINE void stream_f16(uint16_t* p, F a) { stream_half(p, to_f16(a)); }
VV_INLINE void stream_fence() { _mm_sfence(); }

// Lane 4h + q works on counter 2q + h, so that a transpose inside 128-bit halves leaves normals in order.
VV_INLINE U counter_lanes() { return {_mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)}; }
VV_INLINE void interleave4(F& a, F& b, F& c, F& d) {
  const __m256d ab0 = _mm256_castps_pd(_mm256_unpacklo_ps(a.x, b.x)),
                ab1 = _mm256_castps_pd(_mm256_unpackhi_ps(a.x, b.x));
  const __m256d cd0 = _mm256_castps_pd(_mm256_unpacklo_ps(c.x, d.x)),
                cd1 = _mm256_castps_pd(_mm256_unpackhi_ps(c.x, d.x));
  a = {_mm256_castpd_ps(_mm256_unpacklo_pd(ab0, cd0))};
  b = {_mm256_castpd_ps(_mm256_unpackhi_pd(ab0, cd0))};
  c = {_mm256_castpd_ps(_mm256_unpacklo_pd(ab1, cd1))};
  d = {_mm256_castpd_ps(_mm256_unpackhi_pd(ab1, cd1))};
}

}  // namespace vivace::avx2
