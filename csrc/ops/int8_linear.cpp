#include "ops/int8_linear.h"

#include <memory>

#include "core/error.h"
#include "core/float_mode.h"
#include "core/thread_pool.h"
#include "simd/cpu.h"

namespace vivace {
namespace {

constexpr int64_t kOperationsPerByte = 8;  // a core computes so many while it moves a byte in cache

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
  if (args.x.dtype != Dtype::kInt8) fail(op, ": x is not int8");
  if (args.x.data == nullptr && args.shape.width > 0) fail(op, ": x has no memory");
  if (args.x_scale == nullptr || args.weight_scale == nullptr) fail(op, ": a scale has no memory");
  check_results(op, args.gate, args.residual, args.out);
  return true;
}

void int8_linear(const Int8LinearArgs& args, int64_t threads) {
  if (!check_int8_linear(args)) return;
  const auto [batch, tokens, width] = args.shape;
  const int64_t operations = 2 * batch * tokens * width * args.weight.columns;
  parallel_for(threads_for(operations / kOperationsPerByte, threads), int8_linear_tasks(args), [&](int64_t task) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(int8_linear_scratch(args))]);
    int8_linear_task(args, task, scratch.get());
  });
}

}  // namespace vivace
