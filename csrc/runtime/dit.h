// One row of the native DiT (python/vivace/models/dit.py) in one call: latents and modulation vectors in, predictions
// of every guidance branch out. No torch, no Python, no allocation.
//
// Sizes: n samples, B branches, R = B * n rows (branch-major), N tokens, D width, M width of the MLP, L blocks,
// C channels, p edge of a patch. Attention and MLP of a block each have activations of a dtype of their own, which is
// that of their weights, or weights of int8, whose input is quantized by token; hidden states stay float32 from the
// first block to the last. A sample's bits do not depend on n, its lane, other samples, branches or threads.
//
// A row is a fixed sequence of stages (patches, stem, L x (norm, qkv, attention, out, norm, up, down), norm, final,
// pixels) on a team of threads that is woken once; gates, residuals and GELU are epilogues of the linears. int8: norms
// end in integers, and a stage before out and down makes theirs.
//
// Two threads of Zen 5, ms a row in bfloat16 | float32: six blocks of width 192 on 64 tokens, two branches 1.1 | 1.9;
// DiT-B/2 on 256 tokens 64 | 119, two branches 120 | 231; DiT-XL/2 314 | 594. Linears run at 740 to 810 | 395 to 405
// GFLOP/s; norms and the rest take 0.9 | 0.5 % of the time (6.7 | 2.9 % of the smallest model's), a stage costs 1 us
// besides its tasks. So a norm merged into the linear before it could gain no more than that share. Tried in vain:
// blocks of 24 rows in linears of few tasks (between two runs of the same code lay more), longer and shorter waits
// between stages (core/spin.h).
//
// One thread, ms of processor time in bfloat16 | int8: DiT-B/2 112 | 66, DiT-XL/2 580 | 320. Of the int8 row of DiT-B/2
// products take 74 %, their epilogues 8 %, attention 15 %, norms 1.3 %, the stages that only quantize 1.5 %: what doing
// that in the stage before could gain.
#pragma once

#include <cstdint>

#include "runtime/dit_row.h"

namespace vivace {

// Where the time of a row goes, as member 0 of the team sees it, waiting included.
enum class DitStage { kLinear, kAttention, kNorm, kQuantize, kRest };
constexpr int kDitStages = 5;

struct DitCall {
  const void* x;  // [capacity, C, H, W], a lane contiguous
  Dtype x_dtype;
  int64_t lane_stride, capacity;  // elements between lanes; number of them
  const int64_t* lanes;           // [n]
  int64_t samples, branches, height, width;
  const float* positions;           // [N, D]
  const float* const* modulations;  // [R] addresses of [6L + 2, D]: shift, scale, gate of a block's attention, then of
                                    // its MLP; last shift and scale of the head. Scales without the 1 that is added
  const float* const* x_scales;     // [R] addresses of [L, 4], by block and site: the scale of the row's quantized
                                    // input there, 0: one a token. Null: all of them
  float* const* outs;               // [B] addresses of [n, C, H, W]
  void* arena;                      // aligned to 64 bytes, of one call at a time
  int64_t arena_bytes, threads;
  int64_t* clock;  // [kDitStages] nanoseconds, added to; null: not measured
  // Where the input of a linear first held NaN or infinity: (4 block + site) R + row, of the head 4 L R + row, the
  // smallest there is; -1: nowhere. Null: not looked for.
  int64_t* fault;
};

class Dit {
 public:
  // Throws when the shapes of the weights do not fit together. The memory they lie in is the caller's.
  Dit(const DitSizes& sizes, DitWeights weights);

  const DitModel& model() const { return model_; }

  // What a call of up to so many rows, samples, tokens and threads needs; throws when that fits no memory.
  int64_t arena_bytes(int64_t rows, int64_t samples, int64_t tokens, int64_t threads) const;

  // Throws, before any work, when the call is not legal.
  void run(const DitCall& call) const;

 private:
  void check(const DitCall& call) const;

  DitModel model_;
};

}  // namespace vivace
