// One member's way through a row of a DiT: its stages, one after another.
#pragma once

#include <string.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "core/team.h"
#include "runtime/dit.h"
#include "runtime/dit_elements.h"
#include "simd/cpu.h"

namespace vivace {

inline int64_t clock_now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

constexpr int64_t kHotFloats = 4096;  // hidden states that stay in the first-level cache

// What all members of a team share.
struct DitJob {
  const DitModel& model;
  const DitCall& call;
  DitShape shape;
  DitRow row;
  int64_t piece;  // tokens of a task, where an op goes token by token
  int64_t start;  // time, when there is a clock
  std::atomic<int64_t>& fault;
};

// One member's way through a row.
class DitWalk {
 public:
  DitWalk(const DitJob& job, Member& member)
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
        fault_(job.fault),
        uses_(call_.uses, call_.use_count) {}

  void run() {
    inputs();
    if (call_.from == nullptr) linear(row_.stem(call_.positions)), branches();
    const auto blocks = static_cast<int64_t>(model_.weights.blocks.size());
    if (call_.to != nullptr) return look();
    halves(2 * call_.first, 2 * blocks);
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

  // alone: the result is to be kept before it joins the hidden states.
  void linear(int64_t block, DitSite site, bool alone = false) {
    const LinearArgs args = row_.linear(block, site, alone);
    look_at(args.x, kDitSites * block + static_cast<int64_t>(site));
    if (!row_.is_int8(block, site)) return linear(args);
    const Int8LinearArgs int8 = row_.int8_linear(block, site, alone);
    stage(DitStage::kLinear, int8_linear_tasks(int8), [&](int64_t task) { int8_linear_task(int8, task, scratch_); });
  }

  void attend(int64_t block) {
    const DitUse* keys = uses_.keys(2 * block);
    if (keys != nullptr) keep_keys(*keys);
    const AttentionArgs args = row_.attention(block);
    if (call_.ids == nullptr) {
      return stage(DitStage::kAttention, attention_tasks(args),
                   [&](int64_t task) { attention_task(args, task, scratch_); });
    }
    const int64_t tasks = attention_tasks(args), each = tasks / shape_.rows;
    stage(DitStage::kAttention, tasks,
          [&](int64_t task) { attention_task(row_.attention(block, keys, task / each), task, scratch_); });
  }

  // Keys and values of the row's tokens go where they are kept; then, if need be, all that lies there becomes heads.
  void keep_keys(const DitUse& keys) {
    const CacheUpdateArgs args = row_.keep_keys(keys);
    pieces(DitStage::kRest, shape_.rows, [&](int64_t row, int64_t begin, int64_t end) {
      kernels().cache_update_rows(&args, row, begin, end, scratch_);
    });
    if (call_.ids == nullptr || !row_.unpacks(keys)) return;
    const int64_t few = 32, all = shape_.some.tokens, each = (all + few - 1) / few;
    stage(DitStage::kRest, shape_.rows * each, [&](int64_t task) {
      const CacheApplyArgs heads = row_.unpack_keys(keys, task / each);
      const int64_t begin = task % each * few;
      kernels().cache_apply_rows(&heads, 0, begin, std::min(begin + few, all), scratch_);
    });
  }

  // Halves [first, last), without those that kept values stand for.
  void halves(int64_t first, int64_t last) {
    for (int64_t half = uses_.past(first); half < last; half = uses_.past(half + 1)) {
      const int64_t block = half / 2;
      const bool mlp = half % 2 == 1, keeps = uses_.keeps(half);
      norm(block, mlp ? DitSite::kUp : DitSite::kQkv);
      linear(block, mlp ? DitSite::kUp : DitSite::kQkv);
      if (!mlp) attend(block);
      quantize(block, mlp ? DitSite::kDown : DitSite::kOut);
      linear(block, mlp ? DitSite::kDown : DitSite::kOut, keeps);
    }
  }

  // body(row, begin, end), which reads the hidden states, after the uses that lie before it.
  template <typename Body>
  void normed(const Body& body) {
    pieces(DitStage::kNorm, shape_.rows, [&](int64_t row, int64_t begin, int64_t end) {
      use_kept(row, begin, end);
      body(row, begin, end);
    });
    used_ = uses_.next();
  }

  // All uses since the last time on a few tokens after the other, whose hidden states stay in the first-level cache.
  void use_kept(int64_t row, int64_t begin, int64_t end) {
    const int64_t few = uses_.next() - used_ > 1 ? std::max<int64_t>(1, kHotFloats / model_.width) : end - begin;
    for (; used_ < uses_.next() && begin < end; begin += few) {
      for (int64_t i = used_; i < uses_.next(); ++i) use(call_.uses[i], row, begin, std::min(begin + few, end));
    }
  }

  void use(const DitUse& use, int64_t row, int64_t begin, int64_t end) {
    if (use.action == DitAction::kKeys) return;  // when they are there
    if (use.action == DitAction::kOpen) return remember(row, begin, end);
    if (use.action == DitAction::kKeep) {
      const CacheUpdateArgs args = row_.update(use);
      return kernels().cache_update_rows(&args, row, begin, end, scratch_);
    }
    const CacheApplyArgs args = row_.apply(use);
    kernels().cache_apply_rows(&args, row, begin, end, scratch_);
  }

  void remember(int64_t row, int64_t begin, int64_t end) {
    copy_states(row_.base(), row_.hidden(), row * shape_.tokens + begin, end - begin);
  }

  // `count` tokens from the first of them on.
  void copy_states(float* to, const float* from, int64_t first, int64_t count) const {
    const int64_t width = model_.width;
    memcpy(to + first * width, from + first * width, static_cast<size_t>(count * width) * sizeof(float));
  }

  // The first blocks; the hidden states behind them, and what a guard measures.
  void look() {
    const NormModulateArgs args = row_.first_norm();
    const bool blocks = call_.last > 0;
    pieces(DitStage::kRest, shape_.rows, [&](int64_t row, int64_t begin, int64_t end) {
      blocks ? remember(row, begin, end) : kernels().norm_modulate_rows(&args, row, begin, end, scratch_);
    });
    halves(0, 2 * call_.last);
    pieces(DitStage::kRest, shape_.rows, [&](int64_t row, int64_t begin, int64_t end) {
      const int64_t width = model_.width, first = row * shape_.tokens + begin, count = end - begin;
      copy_states(call_.to, row_.hidden(), first, count);
      const float *hidden = row_.hidden(), *base = row_.base();
      for (int64_t i = first * width; i < (first + count) * width; ++i)
        call_.signal[i] = blocks ? hidden[i] - base[i] : base[i];
    });
    if (clock_ != nullptr) member_.wait(), tick();
  }

  void norm(const NormModulateArgs& args) {
    normed([&](int64_t row, int64_t begin, int64_t end) {
      kernels().norm_modulate_rows(&args, row, begin, end, scratch_);
    });
  }

  void norm(int64_t block, DitSite site) {
    if (!row_.is_int8(block, site)) return norm(row_.norm(block, site));
    const Int8NormModulateArgs args = row_.int8_norm(block, site, call_.x_scales != nullptr);
    normed([&](int64_t row, int64_t begin, int64_t end) {
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

  // Patches of all samples, or where the row starts from, and modulation vectors side by side: one task a block, as
  // many vectors.
  void inputs() {
    const bool starts = call_.from == nullptr;
    const int64_t patches = (starts ? shape_.samples : shape_.rows) * pieces_;
    const int64_t vectors = 6, parts = (model_.vectors + vectors - 1) / vectors;
    stage(DitStage::kRest, patches + shape_.rows * parts, [&](int64_t task) {
      if (task < patches) {
        const int64_t begin = task % pieces_ * piece_;
        const int64_t row = task / pieces_, end = std::min(begin + piece_, shape_.tokens);
        return starts ? gather(row, begin, end) : resume(row, begin, end);
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

  // Hidden states that a look left.
  void resume(int64_t row, int64_t begin, int64_t end) const {
    copy_states(row_.hidden() + row * shape_.tokens * model_.width, call_.from[row], begin, end - begin);
  }

  const int32_t* ids_of(int64_t sample) const {
    return call_.ids == nullptr ? nullptr : call_.ids + sample * shape_.tokens;
  }

  void gather(int64_t sample, int64_t begin, int64_t end) const {
    const int32_t* ids = ids_of(sample);
    const int64_t width = model_.width;
    for (int64_t token = begin; ids != nullptr && token < end; ++token) {
      memcpy(row_.positions() + (sample * shape_.tokens + token) * width, call_.positions + ids[token] * width,
             static_cast<size_t>(width) * sizeof(float));
    }
    const bool wide_x = call_.x_dtype == Dtype::kFloat32, wide = model_.sizes.dtype == Dtype::kFloat32;
    const int64_t at = call_.lanes[sample] * call_.lane_stride;
    const int64_t to = sample * shape_.tokens * model_.weights.patches.weight.depth;
    const auto from = [&](auto* x) {
      const auto into = [&](auto* out) {
        gather_patches(x + at, out + to, model_.sizes, call_.height, call_.width, ids, begin, end);
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
      scatter_pixels(row_.pixels() + row * pixels, out, model_.sizes, call_.height, call_.width,
                     ids_of(row % shape_.samples), begin, end);
    });
  }

  void tick() {
    const int64_t time = clock_now();
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
  DitUses uses_;
  int64_t used_ = 0;  // uses done; those up to uses_.next() come before the next half
  DitStage kind_ = DitStage::kRest;
};

}  // namespace vivace
