#include "runtime/dit_row.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/thread_pool.h"

namespace vivace {
namespace {

// Bytes of an element of any activation.
int64_t widest(const DitModel& model) {
  int64_t bytes = dtype_size(model.sizes.dtype);
  for (const DitBlock& block : model.weights.blocks)
    bytes = std::max({bytes, dtype_size(block.attention), dtype_size(block.mlp)});
  return bytes;
}

// The widest input that is quantized; 0 without int8 weights.
int64_t most_integers(const DitModel& model) {
  int64_t most = 0;
  for (const DitBlock& block : model.weights.blocks) {
    for (const DitLinear& layer : block.linears)
      most = std::max(most, layer.weight.dtype == Dtype::kInt8 ? layer.weight.depth : 0);
  }
  return most;
}

}  // namespace

DitArena plan_arena(const DitModel& model, const DitShape& shape, int64_t threads, int64_t scratch_floats) {
  const auto& [rows, samples, tokens, some] = shape;
  const int64_t depth = model.weights.patches.weight.depth, pixels = model.weights.final.weight.columns;
  const int64_t width = model.width, element = widest(model), integers = most_integers(model);
  const int64_t most = std::max({depth, pixels, 3 * width, model.mlp_width, model.vectors * width});
  if (static_cast<double>(rows) * static_cast<double>(tokens) * static_cast<double>(most) > 0x1p46)
    fail("Dit: ", rows, " rows of ", tokens, " tokens fit no memory");
  const int64_t states = rows * tokens;
  int64_t bytes = 0;
  const auto take = [&bytes](int64_t size) {
    const int64_t offset = bytes;
    bytes += (size + 63) / 64 * 64;
    return offset;
  };
  DitArena plan{};
  plan.modulations = take(rows * model.vectors * width * 4);
  plan.hidden = take(states * width * 4);
  plan.fresh = take(states * width * 4);
  plan.base = take(states * width * 4);
  plan.narrow = take(std::max(states * width, samples * tokens * depth) * element);
  plan.broad = take(std::max(states * std::max(3 * width, model.mlp_width) * element, states * pixels * 4));
  plan.heads = take(rows * some.tokens * 2 * width * element);
  plan.integers = take(states * integers);
  plan.scales = take(integers > 0 ? states * 4 : 0);
  plan.given = take(kDitSites * static_cast<int64_t>(model.weights.blocks.size()) * rows * 4);
  plan.scratch_stride = (scratch_floats * 4 + 63) / 64 * 64;
  plan.scratch = take(plan.scratch_stride * std::clamp<int64_t>(threads, 1, kMostThreads));
  plan.bytes = bytes;
  return plan;
}

RowTensor DitRow::states(int64_t offset, Dtype dtype, int64_t width) const {
  return {at<void>(offset), dtype, shape_.tokens * width, width};
}

RowTensor DitRow::vector(int64_t index) const {
  return {modulations() + index * model_.width, Dtype::kFloat32, model_.vectors * model_.width, 0};
}

NormModulateArgs DitRow::norm(int64_t first, double eps, Dtype dtype) const {
  const RowShape shape{shape_.rows, shape_.tokens, model_.width};
  const RowTensor out = states(plan_.narrow, dtype, model_.width);
  return {hidden_states(), vector(first + 1), vector(first), {}, {}, out, shape, true, eps};
}

NormModulateArgs DitRow::norm(int64_t block, DitSite site) const {
  const bool attention = site == DitSite::kQkv;
  const double eps = attention ? model_.sizes.attention_eps : model_.sizes.mlp_eps;
  return norm(6 * block + (attention ? 0 : 3), eps, block_at(block).dtype(site));
}

Int8NormModulateArgs DitRow::int8_norm(int64_t block, DitSite site, bool by_row) const {
  return {norm(block, site), layer(block, site).smooth, by_row ? given(block, site) : nullptr,
          at<int8_t>(plan_.integers), scales()};
}

QuantizeTokensArgs DitRow::quantize(int64_t block, DitSite site, bool by_row) const {
  const DitLinear& linear = layer(block, site);
  const int64_t from = site == DitSite::kOut ? plan_.narrow : plan_.broad, depth = linear.weight.depth;
  return {states(from, block_at(block).dtype(site), depth),
          linear.smooth,
          by_row ? given(block, site) : nullptr,
          at<int8_t>(plan_.integers),
          scales(),
          {shape_.rows, shape_.tokens, depth}};
}

// x W^T + b from one buffer of activations to another.
LinearArgs DitRow::project(const DitLinear& layer, int64_t from, int64_t to, Dtype dtype) const {
  const auto [data, columns, depth, weight_dtype] = layer.weight;
  const bool int8 = weight_dtype == Dtype::kInt8;
  const RowTensor x = int8 ? states(plan_.integers, weight_dtype, depth) : states(from, dtype, depth);
  const RowShape shape{shape_.rows, shape_.tokens, depth};
  return {x, layer.weight, layer.bias, Activation::kNone, {}, {}, states(to, dtype, columns), shape};
}

LinearArgs DitRow::linear(int64_t block, DitSite site, bool alone) const {
  const int64_t from = site == DitSite::kDown ? plan_.broad : plan_.narrow;
  LinearArgs args = project(layer(block, site), from, plan_.broad, block_at(block).dtype(site));
  if (site == DitSite::kUp) args.activation = model_.sizes.gelu;
  if (site == DitSite::kOut || site == DitSite::kDown) {  // hidden + gate * (x W^T + b), in place
    args.gate = gate_of(2 * block + (site == DitSite::kOut ? 0 : 1));
    args.residual = args.out = hidden_states();
    if (alone) args.gate = args.residual = {}, args.out = states(plan_.fresh, Dtype::kFloat32, model_.width);
  }
  return args;
}

Int8LinearArgs DitRow::int8_linear(int64_t block, DitSite site, bool alone) const {
  const auto [x, weight, bias, activation, gate, residual, out, shape] = linear(block, site, alone);
  return {x, scales(), weight, layer(block, site).scale, bias, activation, gate, residual, out, shape};
}

CacheUpdateArgs DitRow::update(const DitUse& use) const {
  const RowShape shape{shape_.rows, shape_.tokens, model_.width};
  const RowTensor hidden = hidden_states();
  if (use.cell == DitCell::kHalf) {
    const RowTensor fresh = states(plan_.fresh, Dtype::kFloat32, model_.width);
    return {fresh, {}, kept(use), use.made, hidden, gate_of(use.at - 1), hidden, shape};
  }
  const RowTensor before = states(plan_.base, Dtype::kFloat32, model_.width);
  return {hidden, use.cell == DitCell::kResidual ? before : RowTensor{}, kept(use), use.made, {}, {}, {}, shape};
}

CacheApplyArgs DitRow::apply(const DitUse& use) const {
  const RowTensor hidden = hidden_states(), by = use.cell == DitCell::kHalf ? gate_of(use.at) : RowTensor{};
  return {kept(use),
          use.weights,
          use.terms,
          use.cell == DitCell::kBlock ? RowTensor{} : hidden,
          by,
          hidden,
          {shape_.rows, shape_.tokens, model_.width}};
}

// Keys and values lie behind the queries of their token.
CacheUpdateArgs DitRow::keep_keys(const DitUse& use) const {
  const int64_t width = model_.width;
  const Dtype dtype = block_at(use.at / 2).attention;
  RowTensor fresh = states(plan_.broad, dtype, 3 * width);
  fresh.data = static_cast<char*>(fresh.data) + width * dtype_size(dtype);
  return {fresh, {}, kept(use), 0, {}, {}, {}, {shape_.rows, shape_.tokens, 2 * width}};
}

CacheApplyArgs DitRow::unpack_keys(const DitUse& use, int64_t row) const {
  static constexpr float kOne = 1.0f;
  const int64_t width = 2 * model_.width, tokens = shape_.some.tokens;
  const Dtype dtype = block_at(use.at / 2).attention;
  const RowTensor out{at<void>(plan_.heads + row * tokens * width * dtype_size(dtype)), dtype, 0, width};
  return {{use.kept.rows + row, use.kept.dtype}, &kOne, 1, {}, {}, out, {1, tokens, width}};
}

NormModulateArgs DitRow::first_norm() const {
  NormModulateArgs args = norm(0, DitSite::kQkv);
  args.out = states(plan_.base, Dtype::kFloat32, model_.width);
  return args;
}

LinearArgs DitRow::stem(const float* positions) const {
  LinearArgs args = project(model_.weights.patches, plan_.narrow, plan_.hidden, model_.sizes.dtype);
  args.out = hidden_states();
  args.residual = {const_cast<float*>(positions), Dtype::kFloat32, 0, model_.width};
  if (shape_.some.ids != nullptr) args.residual = states(plan_.fresh, Dtype::kFloat32, model_.width);
  args.shape.batch = shape_.samples;
  return args;
}

AttentionArgs DitRow::attention(int64_t block, const DitUse* keys, int64_t row) const {
  const int64_t width = model_.width, tokens = shape_.tokens, heads = model_.sizes.heads, head = width / heads;
  const Dtype dtype = block_at(block).attention;
  const int64_t element = dtype_size(dtype);
  const auto part = [&](int64_t i) {
    return HeadTensor{at<void>(plan_.broad + i * width * element), tokens * 3 * width, 3 * width, head};
  };
  const HeadTensor out{at<void>(plan_.narrow), tokens * width, width, head};
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head)));
  if (keys == nullptr) return {part(0), part(1), part(2), out, dtype, shape_.rows, heads, tokens, tokens, head, scale};
  const int64_t all = shape_.some.tokens;
  char* held = unpacks(*keys) ? at<char>(plan_.heads + row * all * 2 * width * element)
                              : static_cast<char*>(keys->kept.rows[row].values);
  const HeadTensor key{held, 0, 2 * width, head}, value{held + width * element, 0, 2 * width, head};
  return {part(0), key, value, out, dtype, shape_.rows, heads, tokens, all, head, scale};
}

LinearArgs DitRow::final() const {
  LinearArgs args = project(model_.weights.final, plan_.narrow, plan_.broad, model_.sizes.dtype);
  args.out = states(plan_.broad, Dtype::kFloat32, args.weight.columns);
  return args;
}

int64_t scratch_floats(const DitModel& model, const DitShape& shape) {
  const DitRow row(model, shape, {}, 0);
  int64_t floats =
      std::max({norm_scratch(model.width), int8_norm_scratch(model.width), cache_update_scratch(2 * model.width),
                cache_apply_scratch(2 * model.width), quantize_scratch(std::max(model.width, model.mlp_width)),
                linear_scratch(row.stem(nullptr)), linear_scratch(row.final())});
  for (int64_t i = 0; i < static_cast<int64_t>(model.weights.blocks.size()); ++i) {
    AttentionArgs attention = row.attention(i);
    if (shape.some.tokens > 0) attention.keys = shape.some.tokens;
    floats = std::max(floats, attention_most_scratch(attention));
    for (const DitSite site : {DitSite::kQkv, DitSite::kOut, DitSite::kUp, DitSite::kDown}) {
      floats = std::max(floats, row.is_int8(i, site) ? int8_linear_scratch(row.int8_linear(i, site))
                                                     : linear_scratch(row.linear(i, site)));
    }
  }
  return floats;
}

}  // namespace vivace
