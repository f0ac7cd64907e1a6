// Every kernel for the avx512 instruction set; see the one-definition warning in simd/vec.h.
#define VV_ISA VV_AVX512
#include "simd/vec.h"
#include "ops/philox_normal.h"
#include "ops/sample_adjust.h"
#include "ops/solver_step.h"
#include "simd/kernels.h"

#include "ops/copy.inl"
#include "ops/philox_normal.inl"
#include "ops/sample_adjust.inl"
#include "ops/solver_step.inl"

namespace vivace::VV_NAMESPACE {

extern const Kernels kKernels = {"avx512", kBlock, step_span, count_keys, add_moments, normal_span, copy_stream};

}  // namespace vivace::VV_NAMESPACE
