// A row of a tiny DiT against the same network in plain double loops; its bits, its memory and what it refuses.
#include "runtime/dit.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "tests/allocations.h"
#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

constexpr int64_t kHeads = 2, kPatch = 2, kChannels = 3, kOut = 6, kWidth = 24, kMlp = 72, kLayers = 2;
constexpr int64_t kVectors = 6 * kLayers + 2, kLanes = 4, kMostSide = 8;
constexpr double kEps[] = {1e-6, 1e-5, 1e-6};

using Matrix = std::vector<double>;  // [rows, columns] of what it is used for

// Weights as drawn, and packed.
struct Layer {
  Layer(Random& random, int64_t columns, int64_t depth, Dtype dtype, bool biased)
      : columns(columns), depth(depth), packed(packed_bytes(columns, depth, dtype), 0), bias(columns, 0) {
    std::vector<float> plain(static_cast<size_t>(columns * depth));
    std::vector<uint16_t> half(plain.size());
    for (size_t i = 0; i < plain.size(); ++i) {
      plain[i] = stored(static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-32f, dtype);
      half[i] = static_cast<uint16_t>(bits(plain[i]) >> 16);
    }
    weight.assign(plain.begin(), plain.end());
    for (int64_t i = 0; i < columns; ++i)
      bias.data()[i] = biased ? static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-33f : 0.0f;
    const void* source = dtype == Dtype::kFloat32 ? static_cast<const void*>(plain.data()) : half.data();
    pack_matrix(packed.data(), source, columns, depth, depth, dtype, 1);
    linear = {{packed.data(), columns, depth, dtype}, biased ? bias.data() : nullptr};
  }

  Matrix operator()(const Matrix& x) const {
    const size_t rows = x.size() / static_cast<size_t>(depth);
    Matrix y(rows * static_cast<size_t>(columns));
    for (size_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        double sum = bias.data()[c];
        for (int64_t k = 0; k < depth; ++k)
          sum +=
              x[r * static_cast<size_t>(depth) + static_cast<size_t>(k)] * weight[static_cast<size_t>(c * depth + k)];
        y[r * static_cast<size_t>(columns) + static_cast<size_t>(c)] = sum;
      }
    }
    return y;
  }

  int64_t columns, depth;
  std::vector<double> weight;
  Buffer<char> packed;
  Buffer<float> bias;
  DitLinear linear{};
};

struct Model {
  Model(Dtype dtype, Activation gelu) : random(5), dtype(dtype), gelu(gelu) {
    const auto add = [&](int64_t columns, int64_t depth, bool biased = true) {
      layers.emplace_back(random, columns, depth, dtype, biased);
    };
    layers.reserve(4 * kLayers + 2);
    add(kWidth, kChannels * kPatch * kPatch);
    for (int64_t i = 0; i < kLayers; ++i) {
      add(3 * kWidth, kWidth, i == 0);
      add(kWidth, kWidth), add(kMlp, kWidth), add(kWidth, kMlp);
    }
    add(kPatch * kPatch * kOut, kWidth);
  }

  DitSizes sizes() const { return {kHeads, kPatch, kChannels, kOut, gelu, kEps[0], kEps[1], kEps[2], dtype}; }
  const Layer& layer(int64_t block, int which) const { return layers[static_cast<size_t>(1 + 4 * block + which)]; }

  DitWeights weights() const {
    DitWeights made{layers.front().linear, {}, layers.back().linear};
    for (int64_t i = 0; i < kLayers; ++i)
      made.blocks.push_back({layer(i, 0).linear, layer(i, 1).linear, layer(i, 2).linear, layer(i, 3).linear});
    return made;
  }

  // The prediction of one sample. x [C, H, W], modulation [kVectors, D], positions [N, D].
  std::vector<double> operator()(const float* x, const float* modulation, const float* positions, int64_t height,
                                 int64_t width) const;

  Random random;
  Dtype dtype;
  Activation gelu;
  std::vector<Layer> layers;
};

Matrix normalised(const Matrix& hidden, const float* shift, const float* scale, double eps) {
  Matrix y = hidden;
  for (size_t row = 0; row < y.size(); row += kWidth) {
    double mean = 0.0, squares = 0.0;
    for (size_t i = 0; i < kWidth; ++i) mean += y[row + i] / kWidth;
    for (size_t i = 0; i < kWidth; ++i) squares += (y[row + i] - mean) * (y[row + i] - mean) / kWidth;
    for (size_t i = 0; i < kWidth; ++i)
      y[row + i] = (y[row + i] - mean) / std::sqrt(squares + eps) * (1.0 + scale[i]) + shift[i];
  }
  return y;
}

Matrix attended(const Matrix& qkv) {
  const size_t tokens = qkv.size() / (3 * kWidth), head = kWidth / kHeads;
  Matrix y(tokens * kWidth);
  for (size_t h = 0; h < kHeads; ++h) {
    const auto at = [&](size_t n, size_t part, size_t i) { return qkv[(n * 3 + part) * kWidth + h * head + i]; };
    for (size_t n = 0; n < tokens; ++n) {
      std::vector<double> weight(tokens);
      double total = 0.0;
      for (size_t m = 0; m < tokens; ++m) {
        double dot = 0.0;
        for (size_t i = 0; i < head; ++i) dot += at(n, 0, i) * at(m, 1, i);
        total += weight[m] = std::exp(dot / std::sqrt(static_cast<double>(head)));
      }
      for (size_t i = 0; i < head; ++i) {
        for (size_t m = 0; m < tokens; ++m) y[n * kWidth + h * head + i] += weight[m] / total * at(m, 2, i);
      }
    }
  }
  return y;
}

void add_gated(Matrix& hidden, const Matrix& update, const float* gate) {
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] += gate[i % kWidth] * update[i];
}

std::vector<double> Model::operator()(const float* x, const float* modulation, const float* positions, int64_t height,
                                      int64_t width) const {
  const int64_t across = width / kPatch, tokens = height / kPatch * across;
  const auto pixel = [&](int64_t n, int64_t c, int64_t row, int64_t column) {
    return (c * height + n / across * kPatch + row) * width + n % across * kPatch + column;
  };
  const auto vector = [&](int64_t i) { return modulation + i * kWidth; };
  Matrix cells;
  for (int64_t n = 0; n < tokens; ++n) {
    for (int64_t i = 0; i < kChannels * kPatch * kPatch; ++i)
      cells.push_back(x[pixel(n, i / (kPatch * kPatch), i / kPatch % kPatch, i % kPatch)]);
  }
  Matrix hidden = layers.front()(cells);
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] += positions[i];
  for (int64_t b = 0; b < kLayers; ++b) {
    const int64_t v = 6 * b;
    const Matrix qkv = layer(b, 0)(normalised(hidden, vector(v), vector(v + 1), kEps[0]));
    add_gated(hidden, layer(b, 1)(attended(qkv)), vector(v + 2));
    Matrix inner = layer(b, 2)(normalised(hidden, vector(v + 3), vector(v + 4), kEps[1]));
    for (double& y : inner) {
      const double cubic = std::sqrt(2.0 / std::acos(-1.0)) * (y + 0.044715 * y * y * y);
      y *= gelu == Activation::kGelu ? 0.5 * std::erfc(-y / std::sqrt(2.0)) : 0.5 * (1.0 + std::tanh(cubic));
    }
    add_gated(hidden, layer(b, 3)(inner), vector(v + 5));
  }
  const Matrix pixels = layers.back()(normalised(hidden, vector(6 * kLayers), vector(6 * kLayers + 1), kEps[2]));
  std::vector<double> out(static_cast<size_t>(kChannels * height * width));
  for (int64_t n = 0; n < tokens; ++n) {
    for (int64_t i = 0; i < kPatch * kPatch * kChannels; ++i) {
      const int64_t cell = i / kChannels, c = i % kChannels;
      out[static_cast<size_t>(pixel(n, c, cell / kPatch, cell % kPatch))] =
          pixels[static_cast<size_t>((n * kPatch * kPatch + cell) * kOut + c)];
    }
  }
  return out;
}

// Inputs and results of one call; the arena ends where its memory ends.
struct Problem {
  Problem(const Model& model, std::vector<int64_t> lanes, int64_t branches, int64_t height, int64_t width)
      : dit(model.sizes(), model.weights()),
        lanes(std::move(lanes)),
        branches(branches),
        height(height),
        width(width),
        image(kChannels * height * width),
        x(kLanes * (image + 1), 1),
        positions(height * width / (kPatch * kPatch) * kWidth, 2),
        modulation(kLanes * 2 * kVectors * kWidth, 3),
        out(branches * samples() * image, 0, NAN) {
    Random draw(9);
    for (Buffer<float>* buffer : {&x, &positions, &modulation}) {
      for (int64_t i = 0; i < buffer->size(); ++i)
        buffer->data()[i] = stored(static_cast<float>(static_cast<int32_t>(draw.word())) * 0x1p-31f, model.dtype);
    }
  }

  int64_t samples() const { return static_cast<int64_t>(lanes.size()); }
  // A sample's vectors follow from its lane and the branch.
  const float* vectors(int64_t branch, int64_t j) const {
    return modulation.data() + (lanes[static_cast<size_t>(j)] * 2 + branch) * kVectors * kWidth;
  }
  const float* latent(int64_t j) const { return x.data() + lanes[static_cast<size_t>(j)] * (image + 1); }
  const float* result(int64_t branch, int64_t j) const { return out.data() + (branch * samples() + j) * image; }

  DitCall call(int64_t threads, int64_t* clock = nullptr) {
    modulations.clear(), outs.clear();
    for (int64_t b = 0; b < branches; ++b) {
      outs.push_back(out.data() + b * samples() * image);
      for (int64_t j = 0; j < samples(); ++j) modulations.push_back(vectors(b, j));
    }
    const int64_t tokens = height * width / (kPatch * kPatch);
    const int64_t bytes = dit.arena_bytes(branches * samples(), samples(), tokens, threads);
    arena = Buffer<char>(bytes, 0, static_cast<char>(0xff));  // NaN
    return {x.data(), Dtype::kFloat32,  image + 1,          kLanes,      lanes.data(), samples(), branches, height,
            width,    positions.data(), modulations.data(), outs.data(), arena.data(), bytes,     threads,  clock};
  }
  void run(int64_t threads) { dit.run(call(threads)); }

  Dit dit;
  std::vector<int64_t> lanes;
  int64_t branches, height, width, image;
  Buffer<float> x, positions, modulation, out;
  std::vector<const float*> modulations{};
  std::vector<float*> outs{};
  Buffer<char> arena{0, 0};
};

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
  CHECK(clock[0] > 0 && clock[1] > 0 && clock[2] > 0 && clock[3] > 0);
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
  CHECK(has(refused([](auto&, auto& w) { w.blocks[1].down.weight.depth = 8; }), "down is [24, 8]; needs [24, 72]"));
  CHECK(has(refused([](auto&, auto& w) { w.blocks[1].qkv.weight.dtype = Dtype::kBfloat16; }), "another dtype"));
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
