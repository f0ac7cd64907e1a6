#include "runtime/dit.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <utility>

#include "core/error.h"
#include "core/float_mode.h"
#include "core/team.h"
#include "runtime/dit_elements.h"
#include "simd/cpu.h"

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

int64_t now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

// What all members share.
struct Job {
  const DitModel& model;
  const DitCall& call;
  DitShape shape;
  DitRow row;
  int64_t piece;  // tokens of a task, where an op goes token by token
  int64_t start;  // time, when there is a clock
  std::atomic<int64_t>& fault;
};

// One member's way through a row.
class Walk {
 public:
  Walk(const Job& job, Member& member)
      : model_(job.model),
        call_(job.call),
        shape_(job.shape),
        row_(job.row),
        member_(member),
        scratch_(row_.scratch(member.number())),
        piece_(job.piece),
        pieces_((shape_.tokens + piece_ - 1) / piece_),
        clock_(member.number() == 0 ? call_.clock : nullptr),
        last_(job.start),
        fault_(job.fault) {}

  void run() {
    inputs();
    linear(row_.stem(call_.positions));
    branches();
    const auto blocks = static_cast<int64_t>(model_.weights.blocks.size());
    for (int64_t i = 0; i < blocks; ++i) {
      norm(i, DitSite::kQkv);
      linear(i, DitSite::kQkv);
      attention(row_.attention(i));
      quantize(i, DitSite::kOut);
      linear(i, DitSite::kOut);
      norm(i, DitSite::kUp);
      linear(i, DitSite::kUp);
      quantize(i, DitSite::kDown);
      linear(i, DitSite::kDown);
    }
    norm(row_.head_norm());
    look_at(row_.final().x, kDitSites * blocks);
    linear(row_.final());
    outputs();
    if (clock_ != nullptr) member_.wait(), tick();
  }

 private:
  // Tasks [0, count) of one stage.
  template <typename Task>
  void stage(DitStage kind, int64_t count, const Task& task) {
    if (clock_ != nullptr) member_.wait(), tick();
    kind_ = kind;
    member_.stage(count, task);
  }

  // body(row, begin, end) for pieces of the tokens of `rows` rows.
  template <typename Body>
  void pieces(DitStage kind, int64_t rows, const Body& body) {
    stage(kind, rows * pieces_, [&](int64_t task) {
      const int64_t begin = task % pieces_ * piece_;
      body(task / pieces_, begin, std::min(begin + piece_, shape_.tokens));
    });
  }

  void linear(const LinearArgs& args) {
    stage(DitStage::kLinear, linear_tasks(args), [&](int64_t task) { linear_task(args, task, scratch_); });
  }

  void linear(int64_t block, DitSite site) {
    const LinearArgs args = row_.linear(block, site);
    look_at(args.x, kDitSites * block + static_cast<int64_t>(site));
    if (!row_.is_int8(block, site)) return linear(args);
    const Int8LinearArgs int8 = row_.int8_linear(block, site);
    stage(DitStage::kLinear, int8_linear_tasks(int8), [&](int64_t task) { int8_linear_task(int8, task, scratch_); });
  }

  void attention(const AttentionArgs& args) {
    stage(DitStage::kAttention, attention_tasks(args), [&](int64_t task) { attention_task(args, task, scratch_); });
  }

  void norm(const NormModulateArgs& args) {
    pieces(DitStage::kNorm, shape_.rows, [&](int64_t row, int64_t begin, int64_t end) {
      kernels().norm_modulate_rows(&args, row, begin, end, scratch_);
    });
  }

  void norm(int64_t block, DitSite site) {
    if (!row_.is_int8(block, site)) return norm(row_.norm(block, site));
    const Int8NormModulateArgs args = row_.int8_norm(block, site, call_.x_scales != nullptr);
    pieces(DitStage::kNorm, shape_.rows, [&](int64_t row, int64_t begin, int64_t end) {
      kernels().int8_norm_modulate_rows(&args, row, begin, end, scratch_);
    });
  }

  void quantize(int64_t block, DitSite site) {
    if (!row_.is_int8(block, site)) return;
    const QuantizeTokensArgs args = row_.quantize(block, site, call_.x_scales != nullptr);
    pieces(DitStage::kQuantize, shape_.rows, [&](int64_t row, int64_t begin, int64_t end) {
      kernels().quantize_tokens_rows(&args, row, begin, end, scratch_);
    });
  }

  // Notes rows whose input of a linear is not finite; of integers their scales tell.
  void look_at(const RowTensor& x, int64_t place) {
    if (call_.fault == nullptr) return;
    pieces(DitStage::kRest, shape_.rows, [&](int64_t row, int64_t begin, int64_t end) {
      const int64_t first = row * shape_.tokens + begin, count = end - begin, width = x.token_stride;
      const bool fine = x.dtype == Dtype::kInt8 ? all_finite(row_.scales() + first, count)
                        : x.dtype == Dtype::kFloat32
                            ? all_finite(static_cast<const float*>(x.data) + first * width, count * width)
                            : all_finite(static_cast<const uint16_t*>(x.data) + first * width, count * width);
      const int64_t found = place * shape_.rows + row;
      int64_t seen = fault_.load(std::memory_order_relaxed);
      while (!fine && found < seen && !fault_.compare_exchange_weak(seen, found, std::memory_order_relaxed)) continue;
    });
  }

  // Patches of all samples, and modulation vectors side by side: one task a block, as many vectors.
  void inputs() {
    const int64_t patches = shape_.samples * pieces_, vectors = 6, parts = (model_.vectors + vectors - 1) / vectors;
    stage(DitStage::kRest, patches + shape_.rows * parts, [&](int64_t task) {
      if (task < patches) {
        const int64_t begin = task % pieces_ * piece_;
        return gather(task / pieces_, begin, std::min(begin + piece_, shape_.tokens));
      }
      const int64_t row = (task - patches) / parts, first = (task - patches) % parts * vectors;
      const int64_t count = std::min(vectors, model_.vectors - first), width = model_.width;
      memcpy(row_.modulations() + (row * model_.vectors + first) * width, call_.modulations[row] + first * width,
             static_cast<size_t>(count * width) * sizeof(float));
      give_scales(row, first / vectors);
    });
  }

  // The scales of one row in one block, each beside those of the other rows.
  void give_scales(int64_t row, int64_t block) const {
    if (call_.x_scales == nullptr || block == static_cast<int64_t>(model_.weights.blocks.size())) return;
    for (int64_t site = 0; site < kDitSites; ++site)
      row_.given(block, static_cast<DitSite>(site))[row] = call_.x_scales[row][kDitSites * block + site];
  }

  void gather(int64_t sample, int64_t begin, int64_t end) const {
    const bool wide_x = call_.x_dtype == Dtype::kFloat32, wide = model_.sizes.dtype == Dtype::kFloat32;
    const int64_t at = call_.lanes[sample] * call_.lane_stride;
    const int64_t to = sample * shape_.tokens * model_.weights.patches.weight.depth;
    const auto from = [&](auto* x) {
      const auto into = [&](auto* out) {
        gather_patches(x + at, out + to, model_.sizes, call_.height, call_.width, begin, end);
      };
      wide ? into(static_cast<float*>(row_.patches())) : into(static_cast<uint16_t*>(row_.patches()));
    };
    wide_x ? from(static_cast<const float*>(call_.x)) : from(static_cast<const uint16_t*>(call_.x));
  }

  // The stem's result is that of every branch.
  void branches() {
    if (call_.branches == 1) return;
    const int64_t width = model_.width, tokens = shape_.tokens;
    pieces(DitStage::kRest, shape_.rows - shape_.samples, [&](int64_t row, int64_t begin, int64_t end) {
      const float* from = row_.hidden() + (row % shape_.samples * tokens + begin) * width;
      float* to = row_.hidden() + ((shape_.samples + row) * tokens + begin) * width;
      memcpy(to, from, static_cast<size_t>((end - begin) * width) * sizeof(float));
    });
  }

  void outputs() {
    const int64_t image = model_.sizes.channels * call_.height * call_.width;
    const int64_t pixels = shape_.tokens * model_.weights.final.weight.columns;
    pieces(DitStage::kRest, shape_.rows, [&](int64_t row, int64_t begin, int64_t end) {
      float* out = call_.outs[row / shape_.samples] + row % shape_.samples * image;
      scatter_pixels(row_.pixels() + row * pixels, out, model_.sizes, call_.height, call_.width, begin, end);
    });
  }

  void tick() {
    const int64_t time = now();
    clock_[static_cast<int>(kind_)] += time - last_;
    last_ = time;
  }

  const DitModel& model_;
  const DitCall& call_;
  const DitShape& shape_;
  const DitRow& row_;
  Member& member_;
  float* scratch_;
  int64_t piece_, pieces_;  // tokens of a task; tasks of a row
  int64_t* clock_;
  int64_t last_;  // time until which all is counted
  std::atomic<int64_t>& fault_;
  DitStage kind_ = DitStage::kRest;
};

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

int64_t Dit::arena_bytes(int64_t rows, int64_t samples, int64_t tokens, int64_t threads) const {
  check_size("rows", rows), check_size("samples", samples), check_size("tokens", tokens);
  int64_t floats = 0;
  for (int64_t fewer = 1; fewer <= tokens; ++fewer)
    floats = std::max(floats, scratch_floats(model_, {rows, samples, fewer}));
  return plan_arena(model_, {rows, samples, tokens}, threads, floats).bytes;
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
  for (int64_t b = 0; b < call.branches; ++b) need("a branch's result", call.outs[b]);
  if (reinterpret_cast<uintptr_t>(call.arena) % 64 != 0) fail("Dit: the arena is not aligned to 64 bytes");
}

void Dit::run(const DitCall& call) const {
  if (call.samples == 0) return;
  check(call);
  const int64_t patch = model_.sizes.patch;
  const DitShape shape{call.samples * call.branches, call.samples, (call.height / patch) * (call.width / patch)};
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
  const Job job{model_, call, shape, row, piece, call.clock != nullptr ? now() : 0, fault};
  Team(members).run([&](Member& member) {
    const FloatMode mode;
    Walk(job, member).run();
  });
  if (call.fault != nullptr) *call.fault = fault == kNone ? -1 : fault.load();
}

}  // namespace vivace
