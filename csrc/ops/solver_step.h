// One solver step of a batch, every sample at its own row of a table, in one pass over memory.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace vivace {

// Layout of a row and its codes; kernels/solver_step/table.py says the same.
constexpr int kMaxSources = 12, kMaxOutputs = 4, kMaxBranches = 16;
constexpr int kIntColumns = 32, kFloatColumns = 72;
constexpr int kSourceColumn = 2, kScaleColumn = 14, kDestinationColumn = 26, kAdjustedColumn = 30, kKindColumn = 31;
constexpr int kPrevColumn = 48, kLowColumn = 64, kHighColumn = 68;
constexpr int32_t kOutCode = 256, kOneCode = 512, kNetCode = 768, kTensorCode = 1024, kNoiseCode = 65536;
constexpr int32_t kNoCode = -1;  // destination in a reduction row
constexpr int64_t kMaxTensors = 1024;

struct Branch {
  const void* data;  // sample b begins b * stride elements in
  int64_t stride;
  Dtype dtype;
};

struct SolverStepArgs {
  float* pool;  // [slots, capacity, numel]
  int64_t slots, capacity, numel;
  const Branch* outs;
  int64_t branches;
  void* net;  // [capacity, numel] or null
  Dtype net_dtype;
  const float* const* tensors;  // side-car tensors, numel elements each
  int64_t tensor_count;
  const int32_t* ints;  // [table_rows, kIntColumns]
  const float* floats;  // [table_rows, kFloatColumns]
  int64_t table_rows;
  const int64_t *rows, *index;  // [batch]
  int64_t batch;
  const int64_t *seeds, *pictures;  // [batch], or null: no row may read noise
  int64_t threads;                  // upper limit
  int64_t stream_above;             // bytes from which stores go around the cache; negative: the last-level cache
  const float* adjust;              // (low, high, gain) per sample [batch, 3], or null: no output may be adjusted
  // Class of every token [batch, tokens], or null: an element of sample b runs row rows[b] + the class of its token.
  // Samples are [channels, *sizes] then, tokens are patches of `edges` of the last `axes` axes in row-major order.
  const uint8_t* classes;
  const int64_t *sizes, *edges;
  int64_t axes;
};

// Checks every code, row and lane, then writes pool and net in place; throws before it writes anything.
void solver_step(const SolverStepArgs& args);

// What a row means for one sample: only the terms it really has, pointers resolved. Built once a sample, read by the
// kernels of csrc/isa.
enum RowKind : int32_t { kUpdate = 0, kThreshold = 1, kRescale = 2 };  // all but kUpdate reduce: see sample_adjust.h
enum class SourceKind : int32_t { kFloat32, kBfloat16, kFloat16, kOne, kNoise };

struct StepSource {
  const void* data;
  const float* scale;  // or null
  SourceKind kind;
  uint32_t draw;
  uint32_t used_by;  // bit k: output k has this term
  float coef[kMaxOutputs];
};

struct StepOutput {
  void* data;
  Dtype dtype;
  bool stream;            // store around the cache; data + head is aligned to a vector then
  bool clamp;             // to [low, high], then times gain
  float low, high, gain;  // low, high of output 0 of a reduction row: its parameters
  float first;            // -0 when there is a term (-0 + v is v, bit for bit), 0 for the empty sum
  uint32_t prev_used;     // bit l: output l is a term
  float prev[kMaxOutputs];
};

struct StepProgram {
  RowKind kind;
  int32_t sources, outputs;
  StepSource source[kMaxSources];
  StepOutput output[kMaxOutputs];
  bool noisy;  // some source is noise
  bool far;    // the pass exceeds the cache: prefetch
  uint32_t seed_low, seed_high, picture;
  int64_t head;   // elements before the first aligned one; stored plainly
  int64_t first;  // index of element 0 in its sample (counters of noise)
};

}  // namespace vivace
