#include "ops/qk_norm_rope.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "core/float_mode.h"
#include "core/thread_pool.h"
#include "simd/cpu.h"

namespace vivace {
namespace {

constexpr int64_t kTaskElements = int64_t{1} << 15;  // 10 us or so: enough to hide what a task costs besides
constexpr int64_t kBytesPerElement = 12;             // what an element costs, as bytes moved in cache, besides its own

bool known(Dtype dtype) { return dtype == Dtype::kFloat32 || dtype == Dtype::kBfloat16; }

void check_side(const char* name, const QkNormRopeArgs& args, const QkSide& side) {
  const double elements = static_cast<double>(args.batch) * static_cast<double>(side.tokens) *
                          static_cast<double>(side.heads) * static_cast<double>(args.width);
  if (side.tokens < 0 || side.heads < 0) fail("qk_norm_rope: ", name, " has a negative size");
  if (elements > 0x1p60) fail("qk_norm_rope: ", name, " fits no memory");
  if (elements == 0) return;
  if (side.x.data == nullptr || side.out.data == nullptr) fail("qk_norm_rope: ", name, " has no memory");
  for (const HeadVector* vector : {&side.weight, &side.bias}) {
    if (vector->data == nullptr) continue;
    if (vector->size != args.width && vector->size != side.heads * args.width)
      fail("qk_norm_rope: a vector of ", name, " has ", vector->size, " elements");
    if (!known(vector->dtype))
      fail("qk_norm_rope: a vector of ", name, " is of dtype ", static_cast<int>(vector->dtype));
  }
  const HeadVector &weight = side.weight, &bias = side.bias;
  if (weight.data && bias.data && weight.size != bias.size)
    fail("qk_norm_rope: weight and bias of ", name, " have ", weight.size, " and ", bias.size, " elements");
  const int64_t last = args.first_row + args.rows;
  if (side.turned && (args.first_row < 0 || args.rows < 0 || last > side.tokens))
    fail("qk_norm_rope: tokens ", args.first_row, " to ", last, " of ", name, " are turned, it has ", side.tokens);
}

void check(const QkNormRopeArgs& args) {
  if (args.batch < 0 || args.width < 0) fail("qk_norm_rope: a size is negative");
  if (!known(args.dtype)) fail("qk_norm_rope: there are no elements of dtype ", static_cast<int>(args.dtype));
  const auto kind = static_cast<int>(args.kind);
  if (kind < 0 || kind > 2) fail("qk_norm_rope: there is no norm ", kind);
  if (!(args.eps >= 0.0) || !std::isfinite(args.eps))
    fail("qk_norm_rope: eps is ", args.eps, "; needs a finite number");
  check_side("query", args, args.side[0]);
  check_side("key", args, args.side[1]);
  if ((!args.side[0].turned && !args.side[1].turned) || args.rows == 0) return;
  if (args.cos.data == nullptr || args.sin.data == nullptr) fail("qk_norm_rope: cos or sin has no memory");
  if (args.width % 2 != 0) fail("qk_norm_rope: heads of ", args.width, " channels cannot be turned in pairs");
}

// A vector in float32: where it lies, or widened into `memory`.
const float* widened(const HeadVector& vector, std::vector<float>& memory) {
  if (vector.data == nullptr || vector.dtype == Dtype::kFloat32) return static_cast<const float*>(vector.data);
  const auto* halves = static_cast<const uint16_t*>(vector.data);
  memory.resize(static_cast<size_t>(vector.size));
  for (size_t i = 0; i < memory.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
    std::memcpy(&memory[i], &bits, 4);
  }
  return memory.data();
}

}  // namespace

void qk_norm_rope(const QkNormRopeArgs& args, int64_t threads) {
  check(args);
  std::vector<float> memory[4];
  QkVectors vectors[2];
  int64_t rows[2], pieces[2], elements = 0;
  for (int s = 0; s < 2; ++s) {
    const QkSide& side = args.side[s];
    const bool across = std::max(side.weight.size, side.bias.size) > args.width;
    vectors[s] = {widened(side.weight, memory[2 * s]), widened(side.bias, memory[2 * s + 1]), across};
    const int64_t token = side.heads * args.width;
    rows[s] = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, token));
    pieces[s] = token == 0 ? 0 : (side.tokens + rows[s] - 1) / rows[s];
    elements += args.batch * side.tokens * token;
  }
  const int64_t bytes = kBytesPerElement + 2 * dtype_size(args.dtype);
  const int64_t each = pieces[0] + pieces[1];
  parallel_for(threads_for(bytes * elements, threads), args.batch * each, [&](int64_t index) {
    const FloatMode mode;
    const int64_t piece = index % each, s = piece >= pieces[0];
    const int64_t begin = (piece - s * pieces[0]) * rows[s];
    const int64_t end = std::min(begin + rows[s], args.side[s].tokens);
    kernels().qk_norm_rope_tokens(args, args.side[s], vectors[s], index / each, begin, end);
  });
}

}  // namespace vivace
