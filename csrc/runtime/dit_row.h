// What the stages of a DiT's row are called with: the weights, the arena, and the arguments of every op.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/attention.h"
#include "ops/linear.h"
#include "ops/norm_modulate.h"

namespace vivace {

struct DitLinear {
  PackedMatrix weight;
  const float* bias;  // may be absent
};

struct DitBlock {
  DitLinear qkv, out, up, down;  // [3D, D], [D, D], [M, D], [D, M]
};

struct DitWeights {
  DitLinear patches;  // [D, C p p], elements of a patch in the order (channel, row, column)
  std::vector<DitBlock> blocks;
  DitLinear final;  // [p p out_channels, D], in the order (row, column, channel)
};

struct DitSizes {
  int64_t heads, patch, channels, out_channels;  // of out_channels the first `channels` are the prediction
  Activation gelu;
  double attention_eps, mlp_eps, head_eps;
  Dtype dtype;  // of weights and activations
};

struct DitModel {
  DitSizes sizes;
  DitWeights weights;
  int64_t width, mlp_width, vectors;  // D, M, 6L + 2
};

// Rows of a call, samples among them, tokens of each.
struct DitShape {
  int64_t rows, samples, tokens;
};

// The arena: offsets in bytes, all multiples of 64. Buffers that are never alive together share memory: `narrow` holds
// patches, normalised states or joined heads, `broad` queries, keys and values, the inside of the MLP, or pixels.
struct DitArena {
  int64_t modulations, hidden, narrow, broad, scratch;
  int64_t scratch_stride;  // bytes from one member's scratch memory to the next
  int64_t bytes;
};

// With so many floats of scratch memory a member; throws when the shape fits no memory.
DitArena plan_arena(const DitModel& model, const DitShape& shape, int64_t threads, int64_t scratch_floats);

// Floats of scratch memory that a member needs for any stage; not the more the more tokens there are.
int64_t scratch_floats(const DitModel& model, const DitShape& shape);

// The arguments of a row's stages in order of use; `arena` is the address of the arena.
class DitRow {
 public:
  DitRow(const DitModel& model, const DitShape& shape, const DitArena& plan, uintptr_t arena)
      : model_(model), shape_(shape), plan_(plan), arena_(arena) {}

  LinearArgs stem(const float* positions) const;
  NormModulateArgs attention_norm(int64_t block) const { return norm(6 * block, model_.sizes.attention_eps); }
  LinearArgs qkv(int64_t block) const;
  AttentionArgs attention() const;
  LinearArgs out(int64_t block) const;
  NormModulateArgs mlp_norm(int64_t block) const { return norm(6 * block + 3, model_.sizes.mlp_eps); }
  LinearArgs up(int64_t block) const;
  LinearArgs down(int64_t block) const;
  NormModulateArgs head_norm() const { return norm(model_.vectors - 2, model_.sizes.head_eps); }
  LinearArgs final() const;

  float* modulations() const { return at<float>(plan_.modulations); }
  float* hidden() const { return at<float>(plan_.hidden); }
  void* patches() const { return at<void>(plan_.narrow); }
  const float* pixels() const { return at<float>(plan_.broad); }
  float* scratch(int member) const { return at<float>(plan_.scratch + member * plan_.scratch_stride); }

 private:
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(arena_ + static_cast<uintptr_t>(offset));
  }
  RowTensor states(int64_t offset, Dtype dtype, int64_t width) const;
  RowTensor hidden_states() const { return states(plan_.hidden, Dtype::kFloat32, model_.width); }
  RowTensor vector(int64_t index) const;
  NormModulateArgs norm(int64_t first, double eps) const;
  LinearArgs project(const DitLinear& layer, int64_t from, int64_t to) const;
  LinearArgs add(const DitLinear& layer, int64_t from, int64_t gate) const;

  const DitModel& model_;
  DitShape shape_;
  DitArena plan_;
  uintptr_t arena_;
};

}  // namespace vivace
