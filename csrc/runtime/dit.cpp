#include "runtime/dit.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>

#include "core/error.h"
#include "core/float_mode.h"
#include "runtime/dit_walk.h"

namespace vivace {
namespace {

constexpr int64_t kMostSize = int64_t{1} << 20;  // of any one size

void check_size(const char* name, int64_t size) {
  if (size < 1 || size > kMostSize) fail("Dit: ", name, " is ", size, "; needs 1 to ", kMostSize);
}

void check_dtype(const char* name, Dtype dtype) {
  if (dtype != Dtype::kFloat32 && dtype != Dtype::kBfloat16) fail("Dit: ", name, " is neither float32 nor bfloat16");
}

void check_layer(const char* name, const DitLinear& layer, int64_t columns, int64_t depth, Dtype dtype,
                 bool int8 = false) {
  const PackedMatrix& w = layer.weight;
  if (w.columns != columns || w.depth != depth)
    fail("Dit: ", name, " is [", w.columns, ", ", w.depth, "]; needs [", columns, ", ", depth, "]");
  if (int8 && w.dtype == Dtype::kInt8) {
    if (layer.scale == nullptr) fail("Dit: ", name, " is int8 and has no scale");
    if (depth > kMostInt8Depth) fail("Dit: ", name, " is int8 and ", depth, " deep; needs at most ", kMostInt8Depth);
  } else if (w.dtype != dtype) {
    fail("Dit: ", name, " has another dtype than its activations");
  }
  if (w.data == nullptr || reinterpret_cast<uintptr_t>(w.data) % 64 != 0)
    fail("Dit: ", name, " has no memory aligned to 64 bytes");
}

void check_sizes(const DitModel& model) {
  const DitSizes& sizes = model.sizes;
  check_size("width", model.width), check_size("MLP width", model.mlp_width), check_size("heads", sizes.heads);
  check_size("patch", sizes.patch), check_size("channels", sizes.channels);
  check_size("out_channels", sizes.out_channels), check_size("number of blocks", (model.vectors - 2) / 6);
  if (model.width % sizes.heads != 0) fail("Dit: width ", model.width, " is no multiple of ", sizes.heads, " heads");
  if (sizes.out_channels < sizes.channels)
    fail("Dit: ", sizes.out_channels, " out_channels hold no prediction of ", sizes.channels, " channels");
  if (sizes.gelu != Activation::kGelu && sizes.gelu != Activation::kGeluTanh) fail("Dit: the activation is no GELU");
  check_dtype("the dtype", sizes.dtype);
  for (const double eps : {sizes.attention_eps, sizes.mlp_eps, sizes.head_eps}) {
    if (!(eps >= 0.0) || !std::isfinite(eps)) fail("Dit: eps is ", eps, "; needs a finite number of 0 or more");
  }
}

}  // namespace

Dit::Dit(const DitSizes& sizes, DitWeights weights) : model_{sizes, std::move(weights), 0, 0, 0} {
  const auto& [patches, blocks, final] = model_.weights;
  if (blocks.empty()) fail("Dit: a model needs a block");
  const int64_t width = patches.weight.columns, mlp_width = blocks[0].at(DitSite::kUp).weight.columns;
  model_.width = width, model_.mlp_width = mlp_width;
  model_.vectors = 6 * static_cast<int64_t>(blocks.size()) + 2;
  check_sizes(model_);
  const int64_t area = sizes.patch * sizes.patch;
  check_layer("patches", patches, width, sizes.channels * area, sizes.dtype);
  for (const DitBlock& block : blocks) {
    check_dtype("a block's attention", block.attention), check_dtype("a block's MLP", block.mlp);
    check_layer("qkv", block.at(DitSite::kQkv), 3 * width, width, block.attention, true);
    check_layer("out", block.at(DitSite::kOut), width, width, block.attention, true);
    check_layer("up", block.at(DitSite::kUp), mlp_width, width, block.mlp, true);
    check_layer("down", block.at(DitSite::kDown), width, mlp_width, block.mlp, true);
  }
  check_layer("final", final, area * sizes.out_channels, width, sizes.dtype);
}

int64_t Dit::arena_bytes(int64_t rows, int64_t samples, int64_t tokens, int64_t threads, bool some) const {
  check_size("rows", rows), check_size("samples", samples), check_size("tokens", tokens);
  int64_t floats = 0;
  for (int64_t fewer = 1; fewer <= tokens; ++fewer)
    floats = std::max(floats, scratch_floats(model_, {rows, samples, fewer, {nullptr, 1, tokens}}));
  return plan_arena(model_, {rows, samples, tokens, {nullptr, 1, some ? tokens : 0}}, threads, floats).bytes;
}

void Dit::check(const DitCall& call) const {
  check_size("samples", call.samples), check_size("branches", call.branches);
  check_size("height", call.height), check_size("width", call.width), check_size("number of lanes", call.capacity);
  const int64_t patch = model_.sizes.patch;
  if (call.height % patch != 0 || call.width % patch != 0)
    fail("Dit: ", call.height, " x ", call.width, " pixels are no multiples of the patch, ", patch);
  check_dtype("x", call.x_dtype);
  if (call.lane_stride < 0 || call.lane_stride > (int64_t{1} << 60) / call.capacity)
    fail("Dit: ", call.capacity, " lanes of ", call.lane_stride, " elements fit no memory");
  const auto need = [](const char* name, const void* address) {
    if (address == nullptr) fail("Dit: ", name, " has no memory");
  };
  need("x", call.x), need("positions", call.positions), need("arena", call.arena);
  for (int64_t j = 0; j < call.samples; ++j) {
    if (call.lanes[j] < 0 || call.lanes[j] >= call.capacity)
      fail("Dit: lane ", call.lanes[j], " of sample ", j, " is not one of ", call.capacity);
  }
  for (int64_t r = 0; r < call.samples * call.branches; ++r) need("a row's modulation", call.modulations[r]);
  for (int64_t r = 0; call.x_scales != nullptr && r < call.samples * call.branches; ++r)
    need("a row's x_scales", call.x_scales[r]);
  for (int64_t b = 0; call.to == nullptr && b < call.branches; ++b) need("a branch's result", call.outs[b]);
  check_range(call);
  if (call.ids != nullptr) check_some(call);
  if (reinterpret_cast<uintptr_t>(call.arena) % 64 != 0) fail("Dit: the arena is not aligned to 64 bytes");
}

void Dit::check_range(const DitCall& call) const {
  const auto blocks = static_cast<int64_t>(model_.weights.blocks.size());
  const int64_t last = call.last < 0 ? blocks : call.last, rows = call.samples * call.branches;
  if (call.first < 0 || call.first > last || last > blocks)
    fail("Dit: blocks ", call.first, " to ", last, " are not some of ", blocks);
  if (call.from == nullptr ? call.first > 0 : call.to != nullptr)
    fail("Dit: a call that begins at block ", call.first, call.from == nullptr ? " needs" : ", to look, has",
         " hidden states to start from");
  for (int64_t r = 0; call.from != nullptr && r < rows; ++r) {
    if (call.from[r] == nullptr) fail("Dit: a row's hidden states have no memory");
  }
  if ((call.to == nullptr) != (call.signal == nullptr) || (call.to == nullptr) != (call.last < 0))
    fail("Dit: a look needs memory for hidden states and signal, and the block where it ends");
  if (call.to != nullptr && call.use_count > 0) fail("Dit: a look keeps and reuses nothing");
  check_uses(call.uses, call.use_count, 2 * call.first, 2 * blocks, rows, call.ids != nullptr);
}

void Dit::check_some(const DitCall& call) const {
  const int64_t patch = model_.sizes.patch, all = (call.height / patch) * (call.width / patch);
  if (call.active < 1 || call.active > all) fail("Dit: ", call.active, " active tokens of ", all);
  if (call.from != nullptr || call.to != nullptr)
    fail("Dit: a row of some tokens begins with its stem and ends with its head");
  for (int64_t i = 0; i < call.samples * call.active; ++i) {
    const int64_t id = call.ids[i], before = i % call.active == 0 ? -1 : call.ids[i - 1];
    if (id <= before || id >= all) fail("Dit: token ", id, " after ", before, " of ", all, "; ids ascend");
  }
}

void Dit::run(const DitCall& call) const {
  if (call.samples == 0) return;
  check(call);
  const int64_t patch = model_.sizes.patch;
  const int64_t all = (call.height / patch) * (call.width / patch);
  const bool some = call.ids != nullptr;
  const DitShape shape{
      call.samples * call.branches, call.samples, some ? call.active : all, {call.ids, call.samples, some ? all : 0}};
  const int members = team_size(call.threads);
  const DitArena plan = plan_arena(model_, shape, members, scratch_floats(model_, shape));
  if (plan.bytes > call.arena_bytes)
    fail("Dit: the arena has ", call.arena_bytes, " bytes; ", shape.rows, " rows of ", shape.tokens, " tokens need ",
         plan.bytes);
  // Pieces that every member gets some of, yet long enough to make modulation vectors once for many tokens.
  const int64_t piece = std::clamp<int64_t>(shape.rows * shape.tokens / (4 * members), 4, 32);
  const DitRow row(model_, shape, plan, reinterpret_cast<uintptr_t>(call.arena));
  constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> fault{kNone};
  const DitJob job{model_, call, shape, row, piece, call.clock != nullptr ? clock_now() : 0, fault};
  Team(members).run([&](Member& member) {
    const FloatMode mode;
    DitWalk(job, member).run();
  });
  if (call.fault != nullptr) *call.fault = fault == kNone ? -1 : fault.load();
}

}  // namespace vivace
