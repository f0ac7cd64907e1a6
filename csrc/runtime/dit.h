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
// Kept values (runtime/dit_uses.h) are written and read in the stage of the norm that follows, few tokens at a time: a
// row has no stage more for them, and what is given again none of its own. One thread, processor time of a row in
// bfloat16 as a share of the plain one's, for DiT-XL/2 | DiT-B/2 | the smallest model with two branches: both halves of
// all blocks kept 1.03 | 1.02 | 1.11; attention given again 0.63 | 0.61 | 0.62, by operations 0.64 | 0.63 | 0.63; the
// MLP 0.38 | 0.40 | 0.50 (0.36 | 0.37 | 0.37); half the blocks 0.50 | 0.51 | 0.55; all of them from one plane a half
// 0.010 | 0.018 | 0.19, from three 0.019 | 0.030 | 0.19, from one of the whole range 0.001 | 0.004 | 0.07. Of the
// smallest model's 0.19 about half is spent in the call from Python. Other programs ran meanwhile; ratios of
// interleaved runs.
//
// A row of some of the tokens has no stage over all of them: patches, positions and pixels go by ids, and the arena is
// that of so few tokens. Keys and values of active tokens are copied to where those of all are kept, in a stage between
// qkv and attention, and queries read them there, where they lie, unless they are stored in another dtype than the
// heads have: then a stage unpacks them. Processor time of one thread in bfloat16 as a share of the plain row's, with
// 3/4, 1/2, 1/4, 1/8 of the tokens active, which is the ideal: seven blocks of DiT-XL/2 on 256 tokens 0.757, 0.521,
// 0.275, 0.158; four on 1024 tokens 0.760, 0.507, 0.254, 0.134; on 256 with two branches 0.743, 0.504, 0.260, 0.145;
// the smallest model with two branches (64 tokens) 0.785, 0.560, 0.324, 0.194. What stays behind: packing all keys
// costs as much as 12 queries, weights are read from memory for fewer rows, and of the smallest model the call from
// Python. A full row that keeps keys and values 0.99 to 1.04; int8 on 256 tokens 0.769, 0.526, 0.279, 0.159. Other
// programs ran meanwhile; medians of interleaved runs.
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
  // A row of some tokens: [samples, active] which, ascending in a sample; only their pixels of outs are written. Every
  // attention needs a use that keeps its keys. Null: all tokens.
  const int32_t* ids = nullptr;
  int64_t active = 0;
  const DitUse* uses = nullptr;  // what the row does with kept values, in order
  int64_t use_count = 0;
  // Blocks [first, last) run; last < 0: all from the first on. from: [R] addresses of the hidden states [N, D] that
  // block `first` reads; null: those of the stem, and first is 0.
  int64_t first = 0, last = -1;
  const float* const* from = nullptr;
  // A look: the call ends before block `last`. to: [R, N, D] the hidden states there; signal: [R, N, D] what the blocks
  // added to them, or, without a block, what the attention of block 0 reads. Such a call has no uses and no outs.
  float *to = nullptr, *signal = nullptr;
};

class Dit {
 public:
  // Throws when the shapes of the weights do not fit together. The memory they lie in is the caller's.
  Dit(const DitSizes& sizes, DitWeights weights);

  const DitModel& model() const { return model_; }

  // What a call of up to so many rows, samples, tokens and threads needs; throws when that fits no memory. some: also
  // calls of some of the tokens.
  int64_t arena_bytes(int64_t rows, int64_t samples, int64_t tokens, int64_t threads, bool some = false) const;

  // Throws, before any work, when the call is not legal.
  void run(const DitCall& call) const;

 private:
  void check(const DitCall& call) const;
  void check_range(const DitCall& call) const;  // of blocks, and what happens between them
  void check_some(const DitCall& call) const;   // of the tokens

  DitModel model_;
};

}  // namespace vivace
