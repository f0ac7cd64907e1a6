// The facade kernels are written against: a vector F of kLanes floats and a vector U of as many 32-bit words.
//
// Each csrc/isa/<name>.cpp defines VV_ISA, includes this file and then every ops/*.inl, all inside its own namespace
// and with its own target flags. One-definition rule: such a file must not instantiate anything with external linkage
// that another file also has (std::min, std::vector, a plain inline function): the linker keeps one copy, perhaps the
// AVX-512 one, and a smaller machine dies on it. Hence: C headers and intrinsics only, everything else inside
// namespace vivace::VV_ISA. Arithmetic is never contracted to FMA (-ffp-contract=off), only fma() is one: all
// sets give the same bits.
#pragma once

#include <stdint.h>
#include <string.h>

#define VV_SCALAR 1
#define VV_AVX2 2
#define VV_AVX512 3
#define VV_AVX512_BF16 4  // and dot products of bfloat16 and int8

#if VV_ISA == VV_AVX512_BF16
#define VV_NAMESPACE avx512_bf16
#elif VV_ISA == VV_AVX512
#define VV_NAMESPACE avx512
#elif VV_ISA == VV_AVX2
#define VV_NAMESPACE avx2
#else
#define VV_NAMESPACE scalar
#endif

#define VV_INLINE static inline __attribute__((always_inline))

#if VV_ISA == VV_AVX512 || VV_ISA == VV_AVX512_BF16
#include "simd/vec_avx512.h"
#elif VV_ISA == VV_AVX2
#include "simd/vec_avx2.h"
#else
#include "simd/vec_scalar.h"
#endif

namespace vivace::VV_NAMESPACE {

// A block is four vectors: the normals of kLanes Philox counters, and enough independent work for the pipelines.
constexpr int kVectors = 4;
constexpr int kBlock = kVectors * kLanes;

}  // namespace vivace::VV_NAMESPACE
