// The dispatch table: one entry a kernel, one table an instruction set (csrc/isa/*.cpp), chosen once at run time.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace vivace {

struct AttentionArgs;
struct AttentionBlocks;
struct Int8LinearArgs;
struct KeyCounts;
struct LinearArgs;
struct Moments;
struct QkNormRopeArgs;
struct QkSide;
struct QkVectors;
struct SelectTokensArgs;
struct StepProgram;

struct Kernels {
  const char* name;
  int64_t block;  // elements a vectorised block covers; spans between threads are cut at multiples of it
  // Elements [begin, end) of one sample of the solver step.
  void (*step_span)(const StepProgram& program, int64_t begin, int64_t end);
  // dst[i] <- src[i] where classes[i] is `mine`, of elements of `size` bytes: a piece of the solver step with classes.
  void (*pick_elements)(void* dst, const float* src, const uint8_t* classes, uint8_t mine, int64_t count, int64_t size);
  // Reductions of a piece of a sample; see ops/sample_adjust.h.
  void (*count_keys)(const float* y, int64_t count, uint32_t start, int high, int low, KeyCounts& counts);
  void (*add_moments)(const float* y, int64_t count, double mean, Moments& moments);
  // Normals [begin, end) of one sample into out[begin..end); begin is a multiple of 4.
  void (*normal_span)(float* out, int64_t begin, int64_t end, uint64_t seed, uint32_t picture, uint32_t draw);
  // Copies bytes with non-temporal stores; the roofline that benches compare with.
  void (*copy_stream)(void* dst, const void* src, int64_t bytes);
  // Rows [begin, end) of one sample; `args` are those of the op, see ops/<op>.h.
  void (*norm_modulate_rows)(const void* args, int64_t sample, int64_t begin, int64_t end, float* scratch);
  void (*gated_residual_rows)(const void* args, int64_t sample, int64_t begin, int64_t end, float* scratch);
  void (*adaln_modulate_rows)(const void* args, int64_t sample, int64_t begin, int64_t end, float* scratch);
  void (*gelu_rows)(const void* args, int64_t sample, int64_t begin, int64_t end, float* scratch);
  void (*quantize_tokens_rows)(const void* args, int64_t sample, int64_t begin, int64_t end, float* scratch);
  void (*int8_norm_modulate_rows)(const void* args, int64_t sample, int64_t begin, int64_t end, float* scratch);
  void (*cache_update_rows)(const void* args, int64_t sample, int64_t begin, int64_t end, float* scratch);
  void (*cache_apply_rows)(const void* args, int64_t sample, int64_t begin, int64_t end, float* scratch);
  void (*gather_tokens_rows)(const void* args, int64_t sample, int64_t begin, int64_t end, float* scratch);
  void (*scatter_tokens_rows)(const void* args, int64_t sample, int64_t begin, int64_t end, float* scratch);
  // Metrics of all pixels of one sample into to[0..pixels).
  void (*pixel_metrics)(const SelectTokensArgs& args, int64_t sample, int64_t pixels, float* to);
  // Tokens [begin, end) of one sample of one side.
  void (*qk_norm_rope_tokens)(const QkNormRopeArgs& args, const QkSide& side, const QkVectors& vectors, int64_t sample,
                              int64_t begin, int64_t end);
  // One task, see ops/linear.h.
  void (*linear_task)(const LinearArgs& args, int64_t task, float* scratch);
  void (*int8_linear_task)(const Int8LinearArgs& args, int64_t task, float* scratch);
  // The roofline of products, see ops/gemm.h.
  void (*products)(Dtype dtype);
  // Queries [begin, end) of one head of one sample; scratch at a multiple of 64 bytes.
  void (*attention_rows)(const AttentionArgs& args, const AttentionBlocks& blocks, int64_t sample, int64_t head,
                         int64_t begin, int64_t end, float* scratch);
};

namespace scalar {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}

}  // namespace vivace
