#include "ops/int8_linear.h"

#include <algorithm>
#include <memory>

#include "core/error.h"
#include "core/float_mode.h"
#include "core/team.h"
#include "ops/one_sample.h"
#include "ops/quantize_tokens.h"
#include "simd/cpu.h"

namespace vivace {
namespace {

constexpr int64_t kOperationsPerByte = 8;             // a core computes so many while it moves a byte in cache
constexpr int64_t kPieceElements = int64_t{1} << 14;  // of x that a task quantizes: a few us

// Memory of a call: scratch of every member, then the integers and scales that x is quantized to.
class Memory {
 public:
  Memory(const Int8LinearArgs& args, int members) : each_(int8_linear_scratch(args)), members_(members) {
    const auto [batch, tokens, width] = args.shape;
    const int64_t rows = args.x.dtype == Dtype::kInt8 ? 0 : batch * tokens;
    integers_ = each_ * members + rows;
    floats_.reset(new float[static_cast<size_t>(integers_ + (rows * width + 3) / 4)]);  // not initialised
  }
  float* scratch(int member) const { return floats_.get() + each_ * member; }
  float* scales() const { return floats_.get() + each_ * members_; }
  int8_t* integers() const { return reinterpret_cast<int8_t*>(floats_.get() + integers_); }

 private:
  int64_t each_, members_, integers_;
  std::unique_ptr<float[]> floats_;
};

void check_x(const char* op, const Int8LinearArgs& args) {
  if (args.x.dtype == Dtype::kInt8) {
    if (args.x.data == nullptr && args.shape.width > 0) fail(op, ": x has no memory");
    if (args.x_scale == nullptr) fail(op, ": a scale has no memory");
    if (args.smooth != nullptr) fail(op, ": smooth is for x that is to be quantized, this is int8");
    return;
  }
  if (args.shape.width == 0) fail(op, ": K is 0, needs 1 or more to be quantized");
  check_rows(op, "x", args.x, args.x.dtype, false);
  if (args.x_scale != nullptr) fail(op, ": x_scale is for x of int8; other x is quantized by its own");
}

}  // namespace

int64_t int8_linear_tasks(const Int8LinearArgs& args) {
  const LinearSplit split = split_rows(args.x, args.shape, args.weight.columns);
  return split.panels * split.groups * split.blocks;
}

int64_t int8_linear_scratch(const Int8LinearArgs&) { return kLinearRows * kPanel + 16; }  // a tile, to be aligned

void int8_linear_task(const Int8LinearArgs& args, int64_t task, float* scratch) {
  const FloatMode mode;
  kernels().int8_linear_task(args, task, scratch);
}

bool check_int8_linear(const Int8LinearArgs& args) {
  const char* op = "int8_linear";
  if (args.weight.dtype != Dtype::kInt8) fail(op, ": weight is not packed int8");
  if (!check_products(op, args.shape, args.weight, args.activation)) return false;
  if (args.shape.width > kMostInt8Depth) fail(op, ": K is ", args.shape.width, ", needs at most ", kMostInt8Depth);
  check_x(op, args);
  if (args.weight_scale == nullptr) fail(op, ": a scale has no memory");
  check_results(op, args.gate, args.residual, args.out);
  return true;
}

void int8_linear(const Int8LinearArgs& call, int64_t threads) {
  if (!check_int8_linear(call)) return;
  const Int8LinearArgs args = as_one_sample(call);
  const auto [batch, tokens, width] = args.shape;
  const int members = threads_for(2 * batch * tokens * width * args.weight.columns / kOperationsPerByte, threads);
  const Memory memory(args, members);
  const bool quantize = args.x.dtype != Dtype::kInt8;
  const QuantizeTokensArgs rows{args.x, args.smooth, nullptr, memory.integers(), memory.scales(), args.shape};
  const int64_t piece = std::max<int64_t>(1, kPieceElements / std::max<int64_t>(1, width));
  const int64_t pieces = (tokens + piece - 1) / piece;
  Int8LinearArgs product = args;
  if (quantize) {
    product.x = {memory.integers(), Dtype::kInt8, tokens * width, width};
    product.x_scale = memory.scales();
  }
  run_team(members, [&](Member& member) {
    float* own = memory.scratch(member.number());
    member.stage(quantize ? batch * pieces : 0, [&](int64_t task) {
      const FloatMode mode;
      const int64_t begin = task % pieces * piece, end = std::min(begin + piece, tokens);
      kernels().quantize_tokens_rows(&rows, task / pieces, begin, end, own);
    });
    member.stage(int8_linear_tasks(product), [&](int64_t task) { int8_linear_task(product, task, own); });
  });
}

}  // namespace vivace
