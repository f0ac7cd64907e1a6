// A row of a tiny DiT against the same network in plain double loops; its bits, its memory and what it refuses.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tests/allocations.h"
#include "tests/dit_model.h"

namespace vivace::test {
namespace {

void check_against_double(Dtype dtype, double tolerance) {
  for (const Activation gelu : {Activation::kGelu, Activation::kGeluTanh}) {
    const Model model(dtype, gelu);
    for (const int64_t height : {2, 6}) {
      Problem one(model, {2, 0, 3}, 2, height, 4);
      one.run(2);
      double worst = 0.0, largest = 0.0;
      for (int64_t row = 0; row < 6; ++row) {
        const int64_t b = row / 3, j = row % 3;
        const auto want = model(one.latent(j), one.vectors(b, j), one.positions.data(), height, 4);
        for (int64_t i = 0; i < one.image; ++i) {
          const double off = std::fabs(one.result(b, j)[i] - want[static_cast<size_t>(i)]);
          worst = off <= worst ? worst : off;  // NaN is the worst
          largest = std::max(largest, std::fabs(want[static_cast<size_t>(i)]));
        }
      }
      CHECK_IN(worst <= tolerance * largest, std::to_string(worst) + " of " + std::to_string(largest));
    }
  }
}

VV_TEST(a_row_in_float32_is_that_of_double) { check_against_double(Dtype::kFloat32, 2e-6); }
VV_TEST(a_row_in_bfloat16_is_that_of_double) { check_against_double(Dtype::kBfloat16, 2e-2); }

VV_TEST(the_bits_of_a_sample_do_not_depend_on_the_others) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBfloat16}) {
    const Model model(dtype, Activation::kGeluTanh);
    Problem all(model, {3, 1, 0}, 2, 6, 8);
    all.run(2);
    for (int64_t j = 0; j < 3; ++j) {
      Problem alone(model, {all.lanes[static_cast<size_t>(j)]}, 1, 6, 8);
      alone.run(1);
      for (int64_t i = 0; i < alone.image; ++i) CHECK(same(alone.result(0, 0)[i], all.result(0, j)[i]));
    }
    Problem again(model, {3, 1, 0}, 2, 6, 8);
    for (const int64_t threads : {1, 2, 3, 64}) {
      again.run(threads);
      for (int64_t i = 0; i < all.out.size(); ++i) CHECK(same(again.out.data()[i], all.out.data()[i]));
    }
  }
}

VV_TEST(latents_may_be_bfloat16) {
  const Model model(Dtype::kBfloat16, Activation::kGelu);
  Problem one(model, {1, 2}, 1, 4, 4), other(model, {1, 2}, 1, 4, 4);
  Buffer<uint16_t> half(one.x.size(), 3);
  for (int64_t i = 0; i < half.size(); ++i) half.data()[i] = static_cast<uint16_t>(bits(one.x.data()[i]) >> 16);
  DitCall call = other.call(1);
  call.x = half.data(), call.x_dtype = Dtype::kBfloat16;
  other.dit.run(call);
  one.run(1);
  for (int64_t i = 0; i < one.out.size(); ++i) CHECK(same(one.out.data()[i], other.out.data()[i]));
}

VV_TEST(a_row_allocates_nothing) {
  const Model model(Dtype::kBfloat16, Activation::kGelu);
  Problem one(model, {0, 1}, 2, 6, 6);
  one.run(2);  // the pool starts its threads
  int64_t clock[kDitStages] = {};
  const DitCall call = one.call(2, clock);
  const int64_t before = allocations();
  one.dit.run(call);
  const int64_t asked = allocations() - before;
  CHECK(asked == 0 && before > 0);
  CHECK(clock[0] > 0 && clock[1] > 0 && clock[2] > 0 && clock[3] == 0 && clock[4] > 0);
}

VV_TEST(an_arena_holds_every_smaller_call) {
  const Model model(Dtype::kFloat32, Activation::kGelu);
  const Dit dit(model.sizes(), model.weights());
  const int64_t bytes = dit.arena_bytes(6, 3, 16, 2);
  CHECK(bytes % 64 == 0);
  for (int64_t n = 1; n <= 3; ++n) {
    for (const int64_t tokens : {1, 2, 15, 16}) CHECK(dit.arena_bytes(2 * n, n, tokens, 2) <= bytes);
  }
  const int64_t apart = (6 * kVectors * kWidth + 6 * 16 * (kWidth + kWidth + kWidth + 3 * kWidth + kMlp)) * 4;
  CHECK(bytes - dit.arena_bytes(6, 3, 16, 1) < bytes && bytes < apart + (int64_t{1} << 20));
}

VV_TEST(illegal_rows_are_refused) {
  const Model model(Dtype::kFloat32, Activation::kGelu);
  Problem one(model, {0, 1}, 2, 4, 4);
  const auto refused = [&](auto change) {
    DitCall call = one.call(1);
    change(call);
    return refusal([&] { one.dit.run(call); });
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(refused([](auto&) {}).empty());
  CHECK(refused([](auto& c) { c.samples = 0, c.x = nullptr; }).empty());
  CHECK(has(refused([](auto& c) { c.samples = -1; }), "samples is -1"));
  CHECK(has(refused([](auto& c) { c.branches = 0; }), "branches is 0"));
  CHECK(has(refused([](auto& c) { c.height = 3; }), "no multiples of the patch"));
  CHECK(has(refused([](auto& c) { c.width = 0; }), "width is 0"));
  CHECK(has(refused([](auto& c) { c.height = c.width = 1 << 20; }), "fit no memory"));
  CHECK(has(refused([](auto& c) { c.height = 8; }), "the arena has"));
  CHECK(has(refused([](auto& c) { --c.arena_bytes; }), "the arena has"));
  CHECK(has(refused([](auto& c) { c.arena = static_cast<char*>(c.arena) + 4; }), "not aligned"));
  CHECK(has(refused([](auto& c) { c.capacity = 1; }), "lane 1 of sample 1"));
  CHECK(has(refused([](auto& c) { c.lane_stride = int64_t{1} << 60; }), "fit no memory"));
  CHECK(has(refused([](auto& c) { c.x_dtype = Dtype::kFloat16; }), "neither float32"));
  CHECK(has(refused([](auto& c) { c.x = nullptr; }), "x has no memory"));
  CHECK(has(refused([](auto& c) { c.positions = nullptr; }), "positions has no memory"));
  CHECK(has(refused([&](auto&) { one.modulations[3] = nullptr; }), "modulation has no memory"));
  CHECK(has(refused([&](auto&) { one.outs[1] = nullptr; }), "result has no memory"));
}

VV_TEST(weights_that_do_not_fit_are_refused) {
  const Model model(Dtype::kFloat32, Activation::kGelu);
  const auto refused = [&](auto change) {
    DitSizes sizes = model.sizes();
    DitWeights weights = model.weights();
    change(sizes, weights);
    return refusal([&] { Dit(sizes, weights); });
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(refused([](auto&, auto&) {}).empty());
  CHECK(has(refused([](auto&, auto& w) { w.blocks.clear(); }), "needs a block"));
  CHECK(
      has(refused([](auto&, auto& w) { w.blocks[1].linears[3].weight.depth = 8; }), "down is [24, 8]; needs [24, 72]"));
  CHECK(has(refused([](auto&, auto& w) { w.blocks[1].linears[0].weight.dtype = Dtype::kBfloat16; }), "another dtype"));
  CHECK(has(refused([](auto&, auto& w) { w.final.weight.data = nullptr; }), "no memory aligned"));
  CHECK(has(refused([](auto&, auto& w) { w.patches.weight.columns = 0; }), "width is 0"));
  CHECK(has(refused([](auto& s, auto&) { s.heads = 5; }), "no multiple of 5 heads"));
  CHECK(has(refused([](auto& s, auto&) { s.out_channels = 2; }), "hold no prediction of 3"));
  CHECK(has(refused([](auto& s, auto&) { s.patch = 1; }), "patches is [24, 12]; needs [24, 3]"));
  CHECK(has(refused([](auto& s, auto&) { s.gelu = Activation::kSilu; }), "no GELU"));
  CHECK(has(refused([](auto& s, auto&) { s.mlp_eps = NAN; }), "eps is nan"));
  CHECK(has(refused([](auto& s, auto&) { s.dtype = Dtype::kFloat16; }), "neither float32"));
}

}  // namespace
}  // namespace vivace::test
