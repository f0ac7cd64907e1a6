#include "runtime/dit_row.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/thread_pool.h"

namespace vivace {

DitArena plan_arena(const DitModel& model, const DitShape& shape, int64_t threads, int64_t scratch_floats) {
  const auto [rows, samples, tokens] = shape;
  const int64_t depth = model.weights.patches.weight.depth, pixels = model.weights.final.weight.columns;
  const int64_t width = model.width, element = dtype_size(model.sizes.dtype);
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
  plan.narrow = take(std::max(states * width, samples * tokens * depth) * element);
  plan.broad = take(std::max(states * std::max(3 * width, model.mlp_width) * element, states * pixels * 4));
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

NormModulateArgs DitRow::norm(int64_t first, double eps) const {
  const RowShape shape{shape_.rows, shape_.tokens, model_.width};
  const RowTensor out = states(plan_.narrow, model_.sizes.dtype, model_.width);
  return {hidden_states(), vector(first + 1), vector(first), {}, {}, out, shape, true, eps};
}

// x W^T + b from one buffer of activations to another.
LinearArgs DitRow::project(const DitLinear& layer, int64_t from, int64_t to) const {
  const Dtype dtype = model_.sizes.dtype;
  const auto [data, columns, depth, weight_dtype] = layer.weight;
  const RowShape shape{shape_.rows, shape_.tokens, depth};
  return {states(from, dtype, depth), layer.weight, layer.bias, Activation::kNone, {}, {},
          states(to, dtype, columns), shape};
}

// hidden + gate * (x W^T + b), in place.
LinearArgs DitRow::add(const DitLinear& layer, int64_t from, int64_t gate) const {
  LinearArgs args = project(layer, from, plan_.hidden);
  args.gate = vector(gate);
  args.residual = args.out = hidden_states();
  return args;
}

LinearArgs DitRow::stem(const float* positions) const {
  LinearArgs args = project(model_.weights.patches, plan_.narrow, plan_.hidden);
  args.out = hidden_states();
  args.residual = {const_cast<float*>(positions), Dtype::kFloat32, 0, model_.width};
  args.shape.batch = shape_.samples;
  return args;
}

LinearArgs DitRow::qkv(int64_t block) const {
  return project(model_.weights.blocks[static_cast<size_t>(block)].qkv, plan_.narrow, plan_.broad);
}

AttentionArgs DitRow::attention() const {
  const int64_t width = model_.width, tokens = shape_.tokens, heads = model_.sizes.heads, head = width / heads;
  const int64_t element = dtype_size(model_.sizes.dtype);
  const auto part = [&](int64_t i) {
    return HeadTensor{at<void>(plan_.broad + i * width * element), tokens * 3 * width, 3 * width, head};
  };
  const HeadTensor out{at<void>(plan_.narrow), tokens * width, width, head};
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head)));
  return {part(0), part(1), part(2), out, model_.sizes.dtype, shape_.rows, heads, tokens, tokens, head, scale};
}

LinearArgs DitRow::out(int64_t block) const {
  return add(model_.weights.blocks[static_cast<size_t>(block)].out, plan_.narrow, 6 * block + 2);
}

LinearArgs DitRow::up(int64_t block) const {
  LinearArgs args = project(model_.weights.blocks[static_cast<size_t>(block)].up, plan_.narrow, plan_.broad);
  args.activation = model_.sizes.gelu;
  return args;
}

LinearArgs DitRow::down(int64_t block) const {
  return add(model_.weights.blocks[static_cast<size_t>(block)].down, plan_.broad, 6 * block + 5);
}

LinearArgs DitRow::final() const {
  LinearArgs args = project(model_.weights.final, plan_.narrow, plan_.broad);
  args.out = states(plan_.broad, Dtype::kFloat32, args.weight.columns);
  return args;
}

int64_t scratch_floats(const DitModel& model, const DitShape& shape) {
  const DitRow row(model, shape, {}, 0);
  int64_t floats = std::max(norm_scratch(model.width), attention_scratch(row.attention()));
  for (const LinearArgs& args : {row.stem(nullptr), row.qkv(0), row.out(0), row.up(0), row.down(0), row.final()})
    floats = std::max(floats, linear_scratch(args));
  return floats;
}

}  // namespace vivace
