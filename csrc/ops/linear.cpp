#include "ops/linear.h"

#include <algorithm>
#include <memory>

#include "core/error.h"
#include "core/float_mode.h"
#include "core/team.h"
#include "ops/one_sample.h"
#include "simd/cpu.h"

namespace vivace {
namespace {

constexpr int64_t kFlopsPerByte = 2;  // a core computes so many while it moves a byte in cache

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

LinearSplit split_rows(const RowTensor& x, const RowShape& shape, int64_t columns) {
  const auto [batch, tokens, width] = shape;
  const bool even = batch == 1 || tokens == 1 || x.sample_stride == tokens * x.token_stride;
  LinearSplit split{};
  split.panels = ceil_div(columns, kPanel);
  split.groups = even ? 1 : batch;
  split.group_rows = even ? batch * tokens : tokens;
  split.stride = tokens == 1 ? x.sample_stride : x.token_stride;
  split.blocks = ceil_div(split.group_rows, kLinearRows);
  split.block_rows = ceil_div(ceil_div(split.group_rows, split.blocks), 6) * 6;  // evenly, in whole strips
  return split;
}

int64_t linear_tasks(const LinearArgs& args) {
  const LinearSplit split = split_rows(args.x, args.shape, args.weight.columns);
  return split.panels * split.groups * split.blocks;
}

int64_t linear_scratch(const LinearArgs&) { return kLinearRows * kPanel + 16; }  // a tile, to be aligned

void linear_task(const LinearArgs& args, int64_t task, float* scratch) {
  const FloatMode mode;
  kernels().linear_task(args, task, scratch);
}

bool check_products(const char* op, const RowShape& shape, const PackedMatrix& weight, Activation activation) {
  const bool results = has_rows(op, {shape.batch, shape.tokens, weight.columns});
  const int64_t bytes = packed_bytes(weight.columns, weight.depth, weight.dtype);
  has_rows(op, shape);
  if (weight.depth != shape.width)
    fail(op, ": x has rows of ", shape.width, ", needs ", weight.depth, " as the packed weight");
  if (activation < Activation::kNone || activation > Activation::kSilu)
    fail(op, ": activation ", static_cast<int32_t>(activation), " is unknown");
  if (!results) return false;
  if (bytes > 0 && weight.data == nullptr) fail(op, ": weight has no memory");
  if (reinterpret_cast<uintptr_t>(weight.data) % 64 != 0) fail(op, ": weight is not aligned to 64 bytes");
  return true;
}

void check_results(const char* op, const RowTensor& gate, const RowTensor& residual, const RowTensor& out) {
  check_rows(op, "out", out, out.dtype, false);
  if (gate.data != nullptr) check_rows(op, "gate", gate, Dtype::kFloat32, true);
  if (residual.data != nullptr) check_rows(op, "residual", residual, out.dtype, false);
}

bool check_linear(const LinearArgs& args) {
  const char* op = "linear";
  if (args.weight.dtype == Dtype::kInt8) fail(op, ": weight is packed int8; that is int8_linear");
  if (!check_products(op, args.shape, args.weight, args.activation)) return false;
  if (args.shape.width > 0) check_rows(op, "x", args.x, args.weight.dtype, false);
  check_results(op, args.gate, args.residual, args.out);
  return true;
}

void linear(const LinearArgs& call, int64_t threads) {
  if (!check_linear(call)) return;
  const LinearArgs args = as_one_sample(call);
  const auto [batch, tokens, width] = args.shape;
  const int64_t flops = 2 * batch * tokens * width * args.weight.columns;
  const int members = threads_for(flops / kFlopsPerByte, threads);
  const int64_t each = linear_scratch(args);
  const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(each * members)]);  // not initialised
  run_team(members, [&](Member& member) {
    float* own = scratch.get() + each * member.number();
    member.stage(linear_tasks(args), [&](int64_t task) { linear_task(args, task, own); });
  });
}

}  // namespace vivace
