// A tiny DiT for tests: weights as drawn and packed, the network in plain double loops, and one call with its memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "runtime/dit.h"
#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {

constexpr int64_t kHeads = 2, kPatch = 2, kChannels = 3, kOut = 6, kWidth = 24, kMlp = 72, kLayers = 2;
constexpr int64_t kVectors = 6 * kLayers + 2, kLanes = 4, kMostSide = 8;
constexpr double kEps[] = {1e-6, 1e-5, 1e-6};

// dtypes of the weights of a block's linears, and of the activations around them.
struct BlockKinds {
  Dtype weights[kDitSites], attention, mlp;
};

inline BlockKinds all_of(Dtype dtype) {
  const Dtype around = dtype == Dtype::kInt8 ? Dtype::kBfloat16 : dtype;
  return {{dtype, dtype, dtype, dtype}, around, around};
}

using Matrix = std::vector<double>;  // [rows, columns] of what it is used for

// Weights as drawn, and packed. int8: with scales, and with numbers that x is multiplied by before.
struct Layer {
  Layer(Random& random, int64_t columns, int64_t depth, Dtype dtype, bool biased)
      : columns(columns),
        depth(depth),
        weight(static_cast<size_t>(columns * depth)),
        packed(packed_bytes(columns, depth, dtype), 0),
        bias(columns, 0),
        scale(columns, 0),
        smooth(depth, 0) {
    const auto draw = [&] { return static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-32f; };
    std::vector<float> plain(weight.size());
    std::vector<uint16_t> half(weight.size());
    std::vector<int8_t> integers(weight.size());
    for (int64_t i = 0; i < columns; ++i) scale.data()[i] = dtype == Dtype::kInt8 ? (1.5f + draw()) * 0x1p-8f : 1.0f;
    for (int64_t k = 0; k < depth; ++k) smooth.data()[k] = dtype == Dtype::kInt8 ? 1.0f + draw() : 1.0f;
    for (size_t i = 0; i < plain.size(); ++i) {
      plain[i] = stored(draw(), dtype == Dtype::kInt8 ? Dtype::kFloat32 : dtype);
      half[i] = static_cast<uint16_t>(bits(plain[i]) >> 16);
      integers[i] = static_cast<int8_t>(std::nearbyint(plain[i] * 254.0f));
      const double by = scale.data()[i / static_cast<size_t>(depth)];
      weight[i] = dtype == Dtype::kInt8 ? integers[i] * by : static_cast<double>(plain[i]);
    }
    for (int64_t i = 0; i < columns; ++i) bias.data()[i] = biased ? draw() * 0.5f : 0.0f;
    const void* source = dtype == Dtype::kInt8      ? static_cast<const void*>(integers.data())
                         : dtype == Dtype::kFloat32 ? static_cast<const void*>(plain.data())
                                                    : half.data();
    pack_matrix(packed.data(), source, columns, depth, depth, dtype, 1);
    const bool int8 = dtype == Dtype::kInt8;
    linear = {{packed.data(), columns, depth, dtype},
              biased ? bias.data() : nullptr,
              int8 ? scale.data() : nullptr,
              int8 && biased ? smooth.data() : nullptr};
  }

  // What the product sees of a row: itself, or the integers nearest to it.
  Matrix seen(const double* x) const {
    Matrix row(x, x + depth);
    if (linear.scale == nullptr) return row;
    double most = 0.0;
    for (int64_t k = 0; k < depth; ++k) {
      if (linear.smooth != nullptr) row[static_cast<size_t>(k)] *= smooth.data()[k];
      most = std::max(most, std::fabs(row[static_cast<size_t>(k)]));
    }
    for (double& one : row) one = most == 0.0 ? one : std::nearbyint(one * 127.0 / most) * most / 127.0;
    return row;
  }

  Matrix operator()(const Matrix& x) const {
    const size_t rows = x.size() / static_cast<size_t>(depth);
    Matrix y(rows * static_cast<size_t>(columns));
    for (size_t r = 0; r < rows; ++r) {
      const Matrix row = seen(x.data() + r * static_cast<size_t>(depth));
      for (int64_t c = 0; c < columns; ++c) {
        double sum = bias.data()[c];
        for (int64_t k = 0; k < depth; ++k)
          sum += row[static_cast<size_t>(k)] * weight[static_cast<size_t>(c * depth + k)];
        y[r * static_cast<size_t>(columns) + static_cast<size_t>(c)] = sum;
      }
    }
    return y;
  }

  int64_t columns, depth;
  std::vector<double> weight;
  Buffer<char> packed;
  Buffer<float> bias, scale, smooth;
  DitLinear linear{};
};

struct Model {
  Model(Dtype dtype, Activation gelu) : Model(dtype, gelu, std::vector<BlockKinds>(kLayers, all_of(dtype))) {}
  Model(Dtype dtype, Activation gelu, std::vector<BlockKinds> blocks)
      : random(5), dtype(dtype), gelu(gelu), kinds(std::move(blocks)) {
    const auto add = [&](int64_t columns, int64_t depth, Dtype kind, bool biased = true) {
      layers.emplace_back(random, columns, depth, kind, biased);
    };
    layers.reserve(4 * kLayers + 2);
    add(kWidth, kChannels * kPatch * kPatch, dtype);
    for (size_t i = 0; i < kLayers; ++i) {
      const auto& kind = kinds[i].weights;
      add(3 * kWidth, kWidth, kind[0], i == 0);
      add(kWidth, kWidth, kind[1]), add(kMlp, kWidth, kind[2]), add(kWidth, kMlp, kind[3]);
    }
    add(kPatch * kPatch * kOut, kWidth, dtype);
  }

  DitSizes sizes() const { return {kHeads, kPatch, kChannels, kOut, gelu, kEps[0], kEps[1], kEps[2], dtype}; }
  const Layer& layer(int64_t block, int which) const { return layers[static_cast<size_t>(1 + 4 * block + which)]; }

  DitWeights weights() const {
    DitWeights made{layers.front().linear, {}, layers.back().linear};
    for (int64_t i = 0; i < kLayers; ++i) {
      const BlockKinds& kind = kinds[static_cast<size_t>(i)];
      made.blocks.push_back(
          {{layer(i, 0).linear, layer(i, 1).linear, layer(i, 2).linear, layer(i, 3).linear}, kind.attention, kind.mlp});
    }
    return made;
  }

  // Queries, keys and values [N, 3 D] of every block. Those of the same tokens of an earlier row, where `fresh` says
  // no, stand for what the row itself has.
  struct Heads {
    std::vector<Matrix> blocks{};
    std::vector<bool> fresh{};  // [N]; empty: all of them
  };

  // The prediction of one sample. x [C, H, W], modulation [kVectors, D], positions [N, D]; heads: read and written.
  std::vector<double> operator()(const float* x, const float* modulation, const float* positions, int64_t height,
                                 int64_t width, Heads* heads = nullptr) const;

  Random random;
  Dtype dtype;
  Activation gelu;
  std::vector<BlockKinds> kinds;
  std::vector<Layer> layers;
};

inline Matrix normalised(const Matrix& hidden, const float* shift, const float* scale, double eps) {
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

inline Matrix attended(const Matrix& qkv) {
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

inline void take_older_keys(Matrix& qkv, size_t block, Model::Heads& heads) {
  heads.blocks.resize(kLayers);
  for (size_t i = 0; i < qkv.size() && !heads.fresh.empty(); ++i) {
    if (i % (3 * kWidth) >= kWidth && !heads.fresh[i / (3 * kWidth)]) qkv[i] = heads.blocks[block][i];
  }
  heads.blocks[block] = qkv;
}

inline void add_gated(Matrix& hidden, const Matrix& update, const float* gate) {
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] += gate[i % kWidth] * update[i];
}

inline std::vector<double> Model::operator()(const float* x, const float* modulation, const float* positions,
                                             int64_t height, int64_t width, Heads* heads) const {
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
    Matrix qkv = layer(b, 0)(normalised(hidden, vector(v), vector(v + 1), kEps[0]));
    if (heads != nullptr) take_older_keys(qkv, static_cast<size_t>(b), *heads);
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

  int64_t pixel(int64_t n, int64_t c, int64_t row, int64_t column) const {
    const int64_t across = width / kPatch;
    return (c * height + n / across * kPatch + row) * width + n % across * kPatch + column;
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
    const int64_t bytes = dit.arena_bytes(branches * samples(), samples(), tokens, threads, some);
    arena = Buffer<char>(bytes, 0, static_cast<char>(0xff));  // NaN
    return {x.data(), Dtype::kFloat32,  image + 1,          kLanes,  lanes.data(), samples(),    branches, height,
            width,    positions.data(), modulations.data(), nullptr, outs.data(),  arena.data(), bytes,    threads,
            clock,    nullptr};
  }
  void run(int64_t threads) { dit.run(call(threads)); }

  Dit dit;
  std::vector<int64_t> lanes;
  int64_t branches, height, width, image;
  bool some = false;  // calls of some of the tokens come, too
  Buffer<float> x, positions, modulation, out;
  std::vector<const float*> modulations{};
  std::vector<float*> outs{};
  Buffer<char> arena{0, 0};
};

}  // namespace vivace::test
