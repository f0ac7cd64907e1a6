// A picture is selected by one thread: metrics of pixels by vectors, then orders by radix sort, which is stable and so
// settles ties by the number of the token.
#include "ops/select_tokens.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/float_mode.h"
#include "core/thread_pool.h"
#include "simd/cpu.h"
#include "simd/kernels.h"

namespace vivace {
namespace {

constexpr int kDigits = 11, kBins = 1 << kDigits, kRounds = 3;  // 33 bits hold 32
constexpr int64_t kMostTokens = int64_t{1} << 22;               // distances of ranks are exact in float32

using Words = std::vector<uint32_t>;

// Keys that order as their floats do, NaN last.
uint32_t key_of(float x) {
  if (x != x) return UINT32_MAX;
  if (x == 0.0f) x = 0.0f;  // not -0
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// A larger age comes first.
uint32_t key_of_age(int32_t age) { return ~(static_cast<uint32_t>(age) ^ 0x80000000u); }

// Tokens in order of keys[token], those of one key as they were.
void sort_by(const Words& keys, Words& order) {
  Words spare(order.size());
  for (int round = 0; round < kRounds; ++round) {
    uint32_t starts[kBins] = {};
    const auto digit = [&](uint32_t token) { return keys[token] >> (round * kDigits) & (kBins - 1); };
    for (const uint32_t token : order) ++starts[digit(token)];
    if (starts[digit(order[0])] == order.size()) continue;  // all alike
    uint32_t sum = 0;
    for (uint32_t& start : starts) sum += std::exchange(start, sum);
    for (const uint32_t token : order) spare[starts[digit(token)]++] = token;
    order.swap(spare);
  }
}

Words in_order(int64_t tokens) {
  Words order(static_cast<size_t>(tokens));
  for (size_t p = 0; p < order.size(); ++p) order[p] = static_cast<uint32_t>(p);
  return order;
}

// Calls put(position) for every combination of indices below `sizes`, the last fastest.
template <typename Put>
void each_place(const int64_t* sizes, const int64_t* strides, int64_t axes, int64_t at, const Put& put) {
  if (axes == 0) return put(at);
  for (int64_t i = 0; i < sizes[0]; ++i) each_place(sizes + 1, strides + 1, axes - 1, at + i * strides[0], put);
}

// The mean metric of the pixels of every token, in row-major order.
std::vector<float> scores_of(const SelectTokensArgs& args, int64_t sample) {
  std::vector<float> scores;
  if (args.plane_count == 0) {
    scores.assign(args.scores + sample * args.tokens, args.scores + (sample + 1) * args.tokens);
    return scores;
  }
  const int64_t pixels = token_pixels(args);
  std::vector<float> metrics(static_cast<size_t>(pixels));
  kernels().pixel_metrics(args, sample, pixels, metrics.data());
  int64_t within[kMostAxes], apart[kMostAxes], stride = 1;  // of neighbouring pixels, of neighbouring tokens
  for (int64_t axis = args.axes - 1; axis >= 0; --axis) {
    within[axis] = stride;
    apart[axis] = stride * args.patch[axis];
    stride *= args.patch[axis] * args.grid[axis];
  }
  scores.reserve(static_cast<size_t>(args.tokens));
  const auto edge = static_cast<float>(pixels / args.tokens);
  each_place(args.grid, apart, args.axes, 0, [&](int64_t token) {
    float sum = 0.0f;
    bool first = true;
    each_place(args.patch, within, args.axes, token, [&](int64_t pixel) {
      const float value = metrics[static_cast<size_t>(pixel)];
      sum = first ? value : sum + value;
      first = false;
    });
    scores.push_back(sum / edge);
  });
  return scores;
}

// How many must be computed now, so that no later row comes too late for others.
int64_t must(const SelectTokensArgs& args, const int32_t* ages) {
  if (args.bound < 0) return 0;
  std::vector<int64_t> counts(static_cast<size_t>(args.bound) + 1, 0);  // by age; the last: all from there on
  int64_t young = 0;
  for (int64_t p = 0; p < args.tokens; ++p)
    ages[p] < 0 ? ++young : ++counts[static_cast<size_t>(std::min<int64_t>(ages[p], args.bound))];
  int64_t due = 0, most = 0;
  for (int64_t d = 1; d <= args.bound + 1; ++d) {
    due += counts[static_cast<size_t>(args.bound + 1 - d)];
    most = std::max(most, due - args.least * (d - 1));
  }
  return std::min(most, args.keep);
}

void select_picture(const SelectTokensArgs& args, int64_t sample) {
  int32_t* ages = args.ages + sample * args.tokens;
  const std::vector<float> scores = scores_of(args, sample);
  Words keys(scores.size()), order = in_order(args.tokens);
  for (size_t p = 0; p < keys.size(); ++p) keys[p] = key_of(scores[p]);
  sort_by(keys, order);
  const int64_t middle = 2 * args.lowest + args.keep - 1;
  for (int64_t rank = 0; rank < args.tokens; ++rank) {
    const uint32_t p = order[static_cast<size_t>(rank)];
    auto effective = static_cast<float>(std::abs(2 * rank - middle));
    if (args.factor_count > 0) effective *= args.factors[std::clamp<int64_t>(ages[p], 0, args.factor_count - 1)];
    keys[p] = key_of(effective);
  }
  order = in_order(args.tokens);
  sort_by(keys, order);
  std::vector<bool> chosen(keys.size(), false);
  int64_t left = args.keep;
  const auto choose = [&](const Words& from, int64_t count) {
    for (size_t i = 0; count > 0; ++i) {
      if (chosen[from[i]]) continue;
      chosen[from[i]] = true;
      --count, --left;
    }
  };
  if (const int64_t forced = must(args, ages); forced > 0) {
    Words oldest = order;
    for (size_t p = 0; p < keys.size(); ++p) keys[p] = key_of_age(ages[p]);
    sort_by(keys, oldest);
    choose(oldest, forced);
  }
  choose(order, left);
  int32_t* ids = args.ids + sample * args.keep;
  for (int64_t p = 0; p < args.tokens; ++p) {
    const bool now = chosen[static_cast<size_t>(p)];
    if (now) *ids++ = static_cast<int32_t>(p);
    ages[p] = now ? 0 : static_cast<int32_t>(static_cast<uint32_t>(ages[p]) + 1u);
  }
}

void check_planes(const SelectTokensArgs& args) {
  const char* op = "select_tokens";
  if (args.plane_count < 0 || args.plane_count > kMostPlanes) fail(op, ": ", args.plane_count, " planes");
  if (args.plane_count == 0) {
    if (args.scores == nullptr) fail(op, ": scores has no memory");
    return;
  }
  if (args.dtype != Dtype::kFloat32 && args.dtype != Dtype::kBfloat16 && args.dtype != Dtype::kFloat16)
    fail(op, ": there are no planes of dtype ", static_cast<int>(args.dtype));
  if (args.metric != TokenMetric::kDeviation && args.metric != TokenMetric::kNorm) fail(op, ": unknown metric");
  if (args.weights == nullptr) fail(op, ": weights has no memory");
  if (args.axes < 1 || args.axes > kMostAxes || args.channels < 1)
    fail(op, ": ", args.axes, " axes of ", args.channels, " channels");
  double pixels = static_cast<double>(args.channels);
  int64_t tokens = 1;
  for (int64_t axis = 0; axis < args.axes; ++axis) {
    if (args.grid[axis] < 1 || args.patch[axis] < 1) fail(op, ": an axis of ", args.grid[axis], " tokens");
    pixels *= static_cast<double>(args.grid[axis]) * static_cast<double>(args.patch[axis]);
    if (pixels > 0x1p40) fail(op, ": the planes fit no memory");
    tokens *= args.grid[axis];
  }
  if (tokens != args.tokens) fail(op, ": a grid of ", tokens, " tokens for ages of ", args.tokens);
  for (int64_t j = 0; j < args.plane_count; ++j) {
    if (args.planes[j] == nullptr) fail(op, ": plane ", j, " has no memory");
  }
}

}  // namespace

int64_t token_pixels(const SelectTokensArgs& args) {
  int64_t pixels = 1;
  for (int64_t axis = 0; axis < args.axes; ++axis) pixels *= args.grid[axis] * args.patch[axis];
  return pixels;
}

void select_tokens(const SelectTokensArgs& args, int64_t threads) {
  const char* op = "select_tokens";
  if (args.batch < 0 || args.tokens < 0 || args.tokens > kMostTokens)
    fail(op, ": ", args.batch, " pictures of ", args.tokens, " tokens");
  if (args.keep < 0 || args.keep > args.tokens) fail(op, ": ", args.keep, " of ", args.tokens, " tokens");
  if (args.lowest < 0 || args.lowest > args.tokens - args.keep) fail(op, ": ", args.lowest, " dropped from the bottom");
  if (args.bound < -1 || args.bound > kMostTokens || args.least < 0 || args.least > args.keep)
    fail(op, ": bound is ", args.bound, ", least ", args.least);
  if (args.batch == 0 || args.tokens == 0) return;
  if (args.ages == nullptr || (args.ids == nullptr && args.keep > 0)) fail(op, ": ages or ids have no memory");
  if (args.factor_count < 0 || (args.factor_count > 0 && args.factors == nullptr)) fail(op, ": factors has no memory");
  check_planes(args);
  const int64_t each = args.plane_count == 0 ? 0 : token_pixels(args) * args.channels * args.plane_count;
  parallel_for(threads_for(4 * args.batch * (each + 32 * args.tokens), threads), args.batch, [&](int64_t b) {
    const FloatMode mode;
    select_picture(args, b);
  });
}

}  // namespace vivace
