// What the stages of a DiT's row are called with: the weights, the arena, and the arguments of every op.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/attention.h"
#include "ops/cache_apply.h"
#include "ops/cache_update.h"
#include "ops/int8_linear.h"
#include "ops/int8_norm_modulate.h"
#include "ops/quantize_tokens.h"
#include "runtime/dit_uses.h"

namespace vivace {

struct DitLinear {
  PackedMatrix weight;            // int8, or of the dtype of the activations around it
  const float* bias;              // may be absent
  const float* scale = nullptr;   // int8: [N], of the weight's rows
  const float* smooth = nullptr;  // int8: [K], x is multiplied by it before it is quantized; may be absent
};

// The linears of a block in order of use.
enum class DitSite { kQkv, kOut, kUp, kDown };
constexpr int64_t kDitSites = 4;

struct DitBlock {
  DitLinear linears[kDitSites];  // [3D, D], [D, D], [M, D], [D, M]
  Dtype attention, mlp;          // of the activations around the first and the last two: float32 or bfloat16

  const DitLinear& at(DitSite site) const { return linears[static_cast<int>(site)]; }
  Dtype dtype(DitSite site) const { return site < DitSite::kUp ? attention : mlp; }
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
  Dtype dtype;  // of weights and activations of stem and head
};

struct DitModel {
  DitSizes sizes;
  DitWeights weights;
  int64_t width, mlp_width, vectors;  // D, M, 6L + 2
};

// Rows of a call, samples among them, tokens of each. some: which tokens of the picture those are; no ids: all of them.
struct DitShape {
  int64_t rows, samples, tokens;
  TokenIds some{};
};

// The arena: offsets in bytes, all multiples of 64. Buffers that are never alive together share memory: `narrow` holds
// patches, normalised states or joined heads, `broad` queries, keys and values, the inside of the MLP, or pixels,
// `integers` the quantized input of a linear, whose scales by token are in `scales`; `given` those by row. `fresh` is
// what a half gave that is kept, or positions of some tokens, `base` the hidden states before a range whose difference
// is, `heads` kept keys and values of all tokens as an attention of some reads them, where they are stored otherwise.
struct DitArena {
  int64_t modulations, hidden, fresh, base, narrow, broad, heads, integers, scales, given, scratch;
  int64_t scratch_stride;  // bytes from one member's scratch memory to the next
  int64_t bytes;
};

// With so many floats of scratch memory a member; throws when the shape fits no memory.
DitArena plan_arena(const DitModel& model, const DitShape& shape, int64_t threads, int64_t scratch_floats);

// Floats of scratch memory that a member needs for any stage; not the more the more tokens there are, but for
// attention, to up to so many keys.
int64_t scratch_floats(const DitModel& model, const DitShape& shape);

// The arguments of a row's stages in order of use; `arena` is the address of the arena.
class DitRow {
 public:
  DitRow(const DitModel& model, const DitShape& shape, const DitArena& plan, uintptr_t arena)
      : model_(model), shape_(shape), plan_(plan), arena_(arena) {}

  LinearArgs stem(const float* positions) const;
  NormModulateArgs norm(int64_t block, DitSite site) const;  // the one before kQkv or kUp
  // x: integers where the weight is int8. alone: of kOut and kDown, without gate and residual, to be kept
  LinearArgs linear(int64_t block, DitSite site, bool alone = false) const;
  // keys: null: those of the row itself. Else kept ones, and only the tasks of that row may be run.
  AttentionArgs attention(int64_t block, const DitUse* keys = nullptr, int64_t row = 0) const;
  NormModulateArgs head_norm() const { return norm(model_.vectors - 2, model_.sizes.head_eps, model_.sizes.dtype); }
  LinearArgs final() const;

  // Where the weight is int8: what makes its integers, and what multiplies them.
  bool is_int8(int64_t block, DitSite site) const { return layer(block, site).weight.dtype == Dtype::kInt8; }
  Int8NormModulateArgs int8_norm(int64_t block, DitSite site, bool by_row) const;  // kQkv, kUp
  QuantizeTokensArgs quantize(int64_t block, DitSite site, bool by_row) const;     // kOut, kDown
  Int8LinearArgs int8_linear(int64_t block, DitSite site, bool alone = false) const;

  CacheUpdateArgs update(const DitUse& use) const;  // of a kKeep
  CacheApplyArgs apply(const DitUse& use) const;    // of a kApply
  CacheUpdateArgs keep_keys(const DitUse& use) const;
  bool unpacks(const DitUse& use) const { return use.kept.dtype != block_at(use.at / 2).attention; }
  CacheApplyArgs unpack_keys(const DitUse& use, int64_t row) const;  // of one row alone, where it unpacks
  NormModulateArgs first_norm() const;                               // of block 0, into `base`

  float* modulations() const { return at<float>(plan_.modulations); }
  float* hidden() const { return at<float>(plan_.hidden); }
  float* base() const { return at<float>(plan_.base); }
  float* positions() const { return at<float>(plan_.fresh); }
  void* patches() const { return at<void>(plan_.narrow); }
  const float* pixels() const { return at<float>(plan_.broad); }
  float* scales() const { return at<float>(plan_.scales); }
  float* given(int64_t block, DitSite site) const {  // [R]
    return at<float>(plan_.given) + (kDitSites * block + static_cast<int64_t>(site)) * shape_.rows;
  }
  float* scratch(int member) const { return at<float>(plan_.scratch + member * plan_.scratch_stride); }

 private:
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(arena_ + static_cast<uintptr_t>(offset));
  }
  RowTensor states(int64_t offset, Dtype dtype, int64_t width) const;
  RowTensor hidden_states() const { return states(plan_.hidden, Dtype::kFloat32, model_.width); }
  KeptRows kept(const DitUse& use) const { return {use.kept.rows, use.kept.dtype, shape_.some}; }
  RowTensor gate_of(int64_t half) const { return vector(3 * half + 2); }
  RowTensor vector(int64_t index) const;
  const DitBlock& block_at(int64_t block) const { return model_.weights.blocks[static_cast<size_t>(block)]; }
  const DitLinear& layer(int64_t block, DitSite site) const { return block_at(block).at(site); }
  NormModulateArgs norm(int64_t first, double eps, Dtype dtype) const;
  LinearArgs project(const DitLinear& layer, int64_t from, int64_t to, Dtype dtype) const;

  const DitModel& model_;
  DitShape shape_;
  DitArena plan_;
  uintptr_t arena_;
};

}  // namespace vivace
