// Every kernel for the instruction set that VV_ISA names, and their table: the body of each csrc/isa/<name>.cpp. See
// the one-definition warning in simd/vec.h.
#include "simd/vec.h"
#include "ops/adaln_modulate.h"
#include "ops/attention.h"
#include "ops/cache_apply.h"
#include "ops/cache_update.h"
#include "ops/gather_tokens.h"
#include "ops/gelu.h"
#include "ops/int8_linear.h"
#include "ops/int8_norm_modulate.h"
#include "ops/linear.h"
#include "ops/philox_normal.h"
#include "ops/qk_norm_rope.h"
#include "ops/quantize_tokens.h"
#include "ops/sample_adjust.h"
#include "ops/scatter_tokens.h"
#include "ops/select_tokens.h"
#include "ops/solver_step.h"
#include "simd/kernels.h"

#define VV_QUOTE(x) #x
#define VV_QUOTED(x) VV_QUOTE(x)

#include "ops/rows.inl"
#include "ops/gated_residual.inl"
#include "ops/norm_modulate.inl"
#include "ops/adaln_modulate.inl"
#include "ops/copy.inl"
#include "ops/gelu.inl"
#include "ops/quantize_tokens.inl"
#include "ops/int8_norm_modulate.inl"
#include "ops/kept.inl"
#include "ops/cache_update.inl"
#include "ops/cache_apply.inl"
#include "ops/gather_tokens.inl"
#include "ops/scatter_tokens.inl"
#include "ops/select_tokens.inl"
#include "ops/gemm.inl"
#include "ops/attention.inl"
#include "ops/linear.inl"
#include "ops/int8_linear.inl"
#include "ops/philox_normal.inl"
#include "ops/qk_norm_rope.inl"
#include "ops/sample_adjust.inl"
#include "ops/solver_step.inl"

namespace vivace::VV_NAMESPACE {

extern const Kernels kKernels = {VV_QUOTED(VV_NAMESPACE),
                                 kBlock,
                                 step_span,
                                 pick_elements,
                                 count_keys,
                                 add_moments,
                                 normal_span,
                                 copy_stream,
                                 norm_modulate_rows,
                                 gated_residual_rows,
                                 adaln_modulate_rows,
                                 gelu_rows,
                                 quantize_tokens_rows,
                                 int8_norm_modulate_rows,
                                 cache_update_rows,
                                 cache_apply_rows,
                                 gather_tokens_rows,
                                 scatter_tokens_rows,
                                 pixel_metrics,
                                 qk_norm_rope_tokens,
                                 linear_task,
                                 int8_linear_task,
                                 products,
                                 attention_rows};

}  // namespace vivace::VV_NAMESPACE
