// Blocks in int8 and in other dtypes than the model's: the bits of their ops one after another, and what is checked.
#include <cmath>
#include <string>
#include <vector>

#include "ops/int8_norm_modulate.h"
#include "tests/allocations.h"
#include "tests/dit_model.h"

namespace vivace::test {
namespace {

constexpr Dtype kF = Dtype::kFloat32, kB = Dtype::kBfloat16, kI = Dtype::kInt8;

// Two blocks each: all int8; linears kept in bfloat16 and MLPs of another dtype; blocks without int8 that differ.
std::vector<std::vector<BlockKinds>> mixtures() {
  return {{all_of(kI), all_of(kI)},
          {{{kI, kB, kF, kF}, kB, kF}, {{kB, kI, kI, kB}, kB, kB}},
          {{{kF, kI, kB, kI}, kF, kB}, all_of(kB)},
          {all_of(kF), all_of(kB)}};
}

// Activations [tokens, width] of one row.
struct States {
  States(int64_t tokens, int64_t width, Dtype dtype)
      : memory(tokens * width * dtype_size(dtype), 0), tensor{memory.data(), dtype, tokens * width, width} {}
  Buffer<char> memory;
  RowTensor tensor;
};

// The prediction of one row by the ops themselves, each called alone.
struct ByOps {
  ByOps(const Model& model, const Problem& one, const float* x_scales)
      : model(model),
        one(one),
        x_scales(x_scales),
        tokens(one.height * one.width / (kPatch * kPatch)),
        hidden(tokens, kWidth, kF),
        scales(tokens, 0) {}

  RowTensor vector(int64_t i) const { return {const_cast<float*>(modulation) + i * kWidth, kF, 0, 0}; }

  NormModulateArgs norm(int64_t v, double eps, const RowTensor& out) const {
    return {hidden.tensor, vector(v + 1), vector(v), {}, {}, out, {1, tokens, kWidth}, true, eps};
  }

  const float* given(int64_t block, int which) const {
    return x_scales == nullptr ? nullptr : x_scales + 4 * block + which;
  }

  // The linear on x, or, where it is int8, on what is in `integers`.
  void product(const Layer& layer, const RowTensor& x, Activation activation, int64_t gate, const RowTensor& residual,
               const RowTensor& out) {
    const auto& [weight, bias, scale, smooth] = layer.linear;
    const RowTensor by = gate < 0 ? RowTensor{} : vector(gate);
    const RowShape shape{1, tokens, layer.depth};
    if (weight.dtype != kI) return linear({x, weight, bias, activation, by, residual, out, shape}, 1);
    const RowTensor q{integers.data(), kI, tokens * layer.depth, layer.depth};
    int8_linear({q, scales.data(), weight, scale, bias, activation, by, residual, out, shape}, 1);
  }

  void normed_product(int64_t block, int which, int64_t v, double eps, Activation activation, const RowTensor& out) {
    const Layer& layer = model.layer(block, which);
    States normed(tokens, kWidth, out.dtype);
    const NormModulateArgs args = norm(v, eps, normed.tensor);
    integers = Buffer<int8_t>(tokens * kWidth, 0);
    if (layer.linear.scale == nullptr) {
      norm_modulate(args, 1);
    } else {
      int8_norm_modulate({args, layer.linear.smooth, given(block, which), integers.data(), scales.data()}, 1);
    }
    product(layer, normed.tensor, activation, -1, {}, out);
  }

  void added_product(int64_t block, int which, const RowTensor& x, int64_t gate) {
    const Layer& layer = model.layer(block, which);
    integers = Buffer<int8_t>(tokens * layer.depth, 0);
    if (layer.linear.scale != nullptr)
      quantize_tokens(
          {x, layer.linear.smooth, given(block, which), integers.data(), scales.data(), {1, tokens, layer.depth}}, 1);
    product(layer, x, Activation::kNone, gate, hidden.tensor, hidden.tensor);
  }

  void attend(const States& qkv, const States& out) const {
    constexpr int64_t head = kWidth / kHeads;
    const auto part = [&](int64_t i) {
      char* at = const_cast<char*>(qkv.memory.data()) + i * kWidth * dtype_size(qkv.tensor.dtype);
      return HeadTensor{at, tokens * 3 * kWidth, 3 * kWidth, head};
    };
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head)));
    attention({part(0),
               part(1),
               part(2),
               {out.tensor.data, tokens * kWidth, kWidth, head},
               qkv.tensor.dtype,
               1,
               kHeads,
               tokens,
               tokens,
               head,
               scale},
              1);
  }

  // Patches in, positions added.
  void embed(int64_t j) {
    const Layer& layer = model.layers.front();
    States cells(tokens, layer.depth, model.dtype);
    for (int64_t n = 0; n < tokens; ++n) {
      for (int64_t i = 0; i < layer.depth; ++i) {
        const float value = one.latent(j)[one.pixel(n, i / (kPatch * kPatch), i / kPatch % kPatch, i % kPatch)];
        const auto half = static_cast<uint16_t>(bits(value) >> 16);
        const int64_t at = n * layer.depth + i;
        if (model.dtype == kF) {
          static_cast<float*>(cells.tensor.data)[at] = value;
        } else {
          static_cast<uint16_t*>(cells.tensor.data)[at] = half;
        }
      }
    }
    const RowTensor positions{const_cast<float*>(one.positions.data()), kF, 0, kWidth};
    product(layer, cells.tensor, Activation::kNone, -1, positions, hidden.tensor);
  }

  std::vector<float> operator()(int64_t b, int64_t j) {
    modulation = one.vectors(b, j);
    embed(j);
    for (int64_t i = 0; i < kLayers; ++i) {
      const BlockKinds& kind = model.kinds[static_cast<size_t>(i)];
      States qkv(tokens, 3 * kWidth, kind.attention), mixed(tokens, kWidth, kind.attention);
      normed_product(i, 0, 6 * i, kEps[0], Activation::kNone, qkv.tensor);
      attend(qkv, mixed);
      added_product(i, 1, mixed.tensor, 6 * i + 2);
      States inner(tokens, kMlp, kind.mlp);
      normed_product(i, 2, 6 * i + 3, kEps[1], model.gelu, inner.tensor);
      added_product(i, 3, inner.tensor, 6 * i + 5);
    }
    const Layer& layer = model.layers.back();
    States normed(tokens, kWidth, model.dtype), pixels(tokens, layer.columns, kF);
    norm_modulate(norm(6 * kLayers, kEps[2], normed.tensor), 1);
    product(layer, normed.tensor, Activation::kNone, -1, {}, pixels.tensor);
    std::vector<float> out(static_cast<size_t>(one.image));
    for (int64_t n = 0; n < tokens; ++n) {
      for (int64_t cell = 0; cell < kPatch * kPatch; ++cell) {
        for (int64_t c = 0; c < kChannels; ++c)
          out[static_cast<size_t>(one.pixel(n, c, cell / kPatch, cell % kPatch))] =
              static_cast<const float*>(pixels.tensor.data)[n * layer.columns + cell * kOut + c];
      }
    }
    return out;
  }

  const Model& model;
  const Problem& one;
  const float *x_scales, *modulation = nullptr;
  int64_t tokens;
  States hidden;
  Buffer<float> scales;
  Buffer<int8_t> integers{0, 0};
};

// Scales of a row, by block and site; of some sites by token.
std::vector<float> fixed_scales(int64_t row) {
  std::vector<float> scales(4 * kLayers);
  for (size_t i = 0; i < scales.size(); ++i)
    scales[i] = i % 3 == 2 ? 0.0f : 0.01f * static_cast<float>(i + 1 + static_cast<size_t>(row));
  return scales;
}

VV_TEST(a_row_of_blocks_of_any_precision_has_the_bits_of_its_ops) {
  for (const Dtype dtype : {kF, kB}) {
    for (const auto& kinds : mixtures()) {
      for (const bool fixed : {false, true}) {
        const Model model(dtype, Activation::kGeluTanh, kinds);
        Problem one(model, {2, 0, 3}, 2, 6, 4);
        std::vector<std::vector<float>> scales;
        std::vector<const float*> addresses;
        for (int64_t row = 0; row < 6; ++row) scales.push_back(fixed_scales(row));
        for (const auto& row : scales) addresses.push_back(row.data());
        DitCall call = one.call(2);
        call.x_scales = fixed ? addresses.data() : nullptr;
        one.dit.run(call);
        for (int64_t row = 0; row < 6; ++row) {
          const auto want = ByOps(model, one, fixed ? addresses[static_cast<size_t>(row)] : nullptr)(row / 3, row % 3);
          bool equal = true;
          for (int64_t i = 0; i < one.image; ++i)
            equal = equal && same(one.result(row / 3, row % 3)[i], want[static_cast<size_t>(i)]);
          CHECK_IN(equal, "row " + std::to_string(row) + (fixed ? " with given scales" : ""));
        }
      }
    }
  }
}

VV_TEST(a_row_in_int8_is_that_of_double) {
  const Model model(kF, Activation::kGelu, {all_of(kI), all_of(kI)});
  Problem one(model, {1}, 1, 6, 8);
  one.run(2);
  const auto want = model(one.latent(0), one.vectors(0, 0), one.positions.data(), 6, 8);
  double off = 0.0, size = 0.0;
  for (int64_t i = 0; i < one.image; ++i) {
    const double wanted = want[static_cast<size_t>(i)], difference = one.result(0, 0)[i] - wanted;
    off += difference * difference, size += wanted * wanted;
  }
  CHECK_IN(off <= 1e-4 * size, std::to_string(std::sqrt(off / size)));  // integers next to each other
}

VV_TEST(the_bits_of_a_sample_in_int8_do_not_depend_on_the_others) {
  for (const auto& kinds : mixtures()) {
    const Model model(kB, Activation::kGelu, kinds);
    Problem all(model, {3, 1, 0}, 2, 6, 8);
    for (const int64_t threads : {1, 2, 3, 64}) {
      all.run(threads);
      for (int64_t j = 0; j < 3; ++j) {
        Problem alone(model, {all.lanes[static_cast<size_t>(j)]}, 1, 6, 8);
        alone.run(1);
        for (int64_t i = 0; i < alone.image; ++i) CHECK(same(alone.result(0, 0)[i], all.result(0, j)[i]));
      }
    }
  }
}

VV_TEST(a_row_in_int8_allocates_nothing) {
  for (const auto& kinds : mixtures()) {
    const Model model(kB, Activation::kGelu, kinds);
    Problem one(model, {0, 1}, 2, 6, 6);
    one.run(2);  // the pool starts its threads
    int64_t clock[kDitStages] = {}, fault = 0;
    DitCall call = one.call(2, clock);
    call.fault = &fault;
    const int64_t before = allocations();
    one.dit.run(call);
    const int64_t asked = allocations() - before;
    const bool quantizes = model.layer(0, 3).linear.scale != nullptr;
    CHECK(asked == 0 && before > 0 && fault == -1);
    CHECK(clock[0] > 0 && clock[2] > 0 && (clock[3] > 0 || !quantizes));
  }
}

VV_TEST(an_arena_holds_every_smaller_call_of_any_precision) {
  for (const auto& kinds : mixtures()) {
    const Model model(kB, Activation::kGelu, kinds);
    const Dit dit(model.sizes(), model.weights());
    const int64_t bytes = dit.arena_bytes(6, 3, 16, 2);
    for (int64_t n = 1; n <= 3; ++n) {
      for (const int64_t tokens : {1, 2, 15, 16}) CHECK(dit.arena_bytes(2 * n, n, tokens, 2) <= bytes);
    }
  }
}

VV_TEST(a_check_names_the_first_linear_that_saw_a_number_that_is_not_finite) {
  for (const auto& kinds : mixtures()) {
    const Model model(kB, Activation::kGelu, kinds);
    const auto found = [&](int64_t row, int64_t vector, float value) {
      Problem one(model, {2, 0, 3}, 2, 6, 4);
      one.modulation
          .data()[(one.lanes[static_cast<size_t>(row % 3)] * 2 + row / 3) * kVectors * kWidth + vector * kWidth + 5] =
          value;
      int64_t fault = -2;
      DitCall call = one.call(2);
      call.fault = &fault;
      one.dit.run(call);
      return fault;
    };
    CHECK(found(0, 0, 1.0f) == -1);
    CHECK(found(4, 0, NAN) == 0 * 6 + 4);            // a shift of block 0: its qkv
    CHECK(found(2, 4, INFINITY) == 2 * 6 + 2);       // a scale of its MLP: up
    CHECK(found(1, 5, -INFINITY) == 4 * 6 + 1);      // its last gate: qkv of block 1
    CHECK(found(3, 8, NAN) == 6 * 6 + 3);            // the first gate of block 1: its up
    CHECK(found(5, 6 * kLayers, NAN) == 8 * 6 + 5);  // a shift of the head
  }
}

VV_TEST(int8_weights_that_do_not_fit_are_refused) {
  const Model model(kB, Activation::kGelu, {all_of(kI), all_of(kI)});
  const auto refused = [&](auto change) {
    DitSizes sizes = model.sizes();
    DitWeights weights = model.weights();
    change(sizes, weights);
    return refusal([&] { Dit(sizes, weights); });
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(refused([](auto&, auto&) {}).empty());
  CHECK(has(refused([](auto&, auto& w) { w.blocks[1].linears[1].scale = nullptr; }), "out is int8 and has no scale"));
  CHECK(has(refused([](auto&, auto& w) { w.blocks[0].linears[2].weight.dtype = kF; }), "up has another dtype"));
  CHECK(has(refused([](auto&, auto& w) { w.blocks[0].attention = kI; }), "attention is neither float32"));
  CHECK(has(refused([](auto&, auto& w) { w.final.weight.dtype = kI; }), "final has another dtype"));
  Problem one(model, {0, 1}, 1, 4, 4);
  const float* addresses[] = {one.modulation.data(), nullptr};
  DitCall call = one.call(1);
  call.x_scales = addresses;
  CHECK(has(refusal([&] { one.dit.run(call); }), "x_scales has no memory"));
}

}  // namespace
}  // namespace vivace::test
