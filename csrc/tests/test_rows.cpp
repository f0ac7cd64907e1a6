// The ops over rows against their definitions, element by element: every width, dtype and layout, bit for bit.
#include <cmath>
#include <string>
#include <vector>

#include "ops/adaln_modulate.h"
#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

constexpr int64_t kBatch = 2, kTokens = 3;
constexpr int64_t kWidths[] = {1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 123, 127, 128, 200, 384};
constexpr double kEps = 1e-6;

// A tensor [batch, tokens, width] with a gap of `gap` elements between rows, ending where its memory ends.
template <typename T>
struct Tensor {
  Tensor(int64_t batch, int64_t tokens, int64_t width, int64_t gap = 0)
      : width(width), stride(width + gap), tokens(tokens), buffer(batch * tokens * stride - gap, gap ? 3 : 0) {}

  // Of order one; one in 500 may be huge, infinite or NaN, so that long rows are not all spoilt.
  void fill(Random& random) {
    for (int64_t i = 0; i < buffer.size(); ++i) {
      const float tame = static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-30f;
      set(buffer.data() + i, random.below(500) == 0 ? random.value() : tame);
    }
  }
  float at(int64_t b, int64_t n, int64_t i) const { return get(buffer.data() + (b * tokens + n) * stride + i); }
  RowTensor rows() {
    return {buffer.data(), sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kBfloat16, tokens * stride, stride};
  }
  // Shared by the tokens of a sample, or by all rows.
  RowTensor by_sample() { return {rows().data, rows().dtype, stride, 0}; }
  RowTensor shared() { return {rows().data, rows().dtype, 0, 0}; }

  static float get(const float* p) { return *p; }
  static float get(const uint16_t* p) { return widen(*p, Dtype::kBfloat16); }
  static void set(float* p, float x) { *p = x; }
  static void set(uint16_t* p, float x) { *p = static_cast<uint16_t>(bits(stored(x, Dtype::kBfloat16)) >> 16); }

  int64_t width, stride, tokens;
  Buffer<T> buffer;
};

template <typename T>
float rounded_to(float x) {
  return sizeof(T) == 4 ? x : stored(x, Dtype::kBfloat16);
}

float tree(const std::vector<float>& terms) {
  float sums[32] = {};
  for (size_t i = 0; i < terms.size(); i += 64) {
    const auto term = [&](size_t j) { return j < terms.size() ? terms[j] : 0.0f; };
    for (size_t l = 0; l < 32; ++l) sums[l] = sums[l] + (term(i + l) + term(i + l + 32));
  }
  for (int half = 16; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] = sums[l] + sums[l + half];
  }
  return sums[0];
}

std::vector<float> normalised(const std::vector<float>& x, bool centred, double eps) {
  const auto count = static_cast<double>(x.size());
  std::vector<float> y = x, squares = x;
  float mean = 0.0f, rest = 0.0f;
  double offset = 0.0;
  if (centred) {
    mean = static_cast<float>(tree(x) / count);
    for (float& v : y) v = v - mean;
    const double off = tree(y) / count;
    rest = static_cast<float>(off);
    offset = off * off;
  }
  for (size_t i = 0; i < y.size(); ++i) squares[i] = y[i] * y[i];
  double variance = tree(squares) / count - offset;
  if (variance < 0.0) variance = 0.0;
  const auto gain = static_cast<float>(1.0 / std::sqrt(variance + eps));
  for (float& v : y) v = (centred ? v - rest : v) * gain;
  return y;
}

template <typename T>
struct Problem {
  Problem(int64_t width, int64_t gap, uint64_t seed)
      : hidden(kBatch, kTokens, width, gap),
        update(kBatch, kTokens, width, gap),
        gate(kBatch, 1, width, gap),
        scale(kBatch, kTokens, width),
        shift(kBatch, 1, width),
        weight(1, 1, width),
        bias(1, 1, width, 0),
        h(kBatch, kTokens, width, gap),
        m(kBatch, kTokens, width, gap) {
    Random random(seed + static_cast<uint64_t>(width));
    hidden.fill(random), update.fill(random), gate.fill(random);
    scale.fill(random), shift.fill(random), weight.fill(random), bias.fill(random);
  }

  AdalnModulateArgs args(bool centred, bool modulated) {
    const RowShape shape{kBatch, kTokens, hidden.width};
    AdalnModulateArgs made{};
    made.residual = {hidden.rows(), update.rows(), gate.by_sample(), h.rows(), shape};
    made.norm = {h.rows(), {}, {}, {}, {}, m.rows(), shape, centred, kEps};
    if (modulated) {
      made.norm.scale = scale.rows(), made.norm.shift = shift.by_sample();
      made.norm.weight = weight.shared(), made.norm.bias = bias.shared();
    }
    return made;
  }

  float expected_h(int64_t b, int64_t n, int64_t i) const {
    return rounded_to<T>(hidden.at(b, n, i) + gate.at(b, 0, i) * update.at(b, n, i));
  }

  std::vector<float> expected_m(int64_t b, int64_t n, bool centred, bool modulated) const {
    std::vector<float> x;
    for (int64_t i = 0; i < hidden.width; ++i) x.push_back(expected_h(b, n, i));
    std::vector<float> y = normalised(x, centred, kEps);
    for (int64_t i = 0; i < hidden.width; ++i) {
      float& v = y[static_cast<size_t>(i)];
      const float one = 1.0f + scale.at(b, n, i);
      if (modulated) v = v * (one * weight.at(0, 0, i)) + (0.0f + bias.at(0, 0, i) * one + shift.at(b, 0, i));
      v = rounded_to<T>(v);
    }
    return y;
  }

  // Both results are those of the definitions.
  bool right(bool centred, bool modulated) const {
    for (int64_t b = 0; b < kBatch; ++b) {
      for (int64_t n = 0; n < kTokens; ++n) {
        const std::vector<float> y = expected_m(b, n, centred, modulated);
        for (int64_t i = 0; i < hidden.width; ++i) {
          if (!same(h.at(b, n, i), expected_h(b, n, i)) || !same(m.at(b, n, i), y[static_cast<size_t>(i)]))
            return false;
        }
      }
    }
    return true;
  }

  Tensor<T> hidden, update;
  Tensor<float> gate;
  Tensor<T> scale, shift;
  Tensor<float> weight;
  Tensor<T> bias, h, m;
};

template <typename T>
void check_all(const char* name) {
  for (const int64_t width : kWidths) {
    for (const int64_t gap : {0, 5}) {
      for (const bool centred : {false, true}) {
        for (const bool modulated : {false, true}) {
          Problem<T> one(width, gap, 1), apart(width, gap, 1);
          const std::string where = std::string(name) + " " + std::to_string(width);
          adaln_modulate(one.args(centred, modulated), 1);
          CHECK_IN(one.right(centred, modulated), where);
          const AdalnModulateArgs args = apart.args(centred, modulated);
          gated_residual(args.residual, 1);
          norm_modulate(args.norm, 1);
          CHECK_IN(apart.right(centred, modulated), where);
        }
      }
    }
  }
}

VV_TEST(rows_of_float32_have_the_bits_of_the_definitions) { check_all<float>("float32"); }
VV_TEST(rows_of_bfloat16_have_the_bits_of_the_definitions) { check_all<uint16_t>("bfloat16"); }

VV_TEST(results_may_take_the_place_of_inputs) {
  for (const int64_t width : {17, 64, 123}) {
    Problem<float> one(width, 5, 2), there(width, 5, 2);
    AdalnModulateArgs args = one.args(true, true);
    args.residual.out = args.norm.hidden = one.update.rows();
    args.norm.out = one.hidden.rows();
    adaln_modulate(args, 1);
    adaln_modulate(there.args(true, true), 1);
    for (int64_t i = 0; i < width; ++i) {
      CHECK(same(one.hidden.at(1, 2, i), there.m.at(1, 2, i)) && same(one.update.at(1, 2, i), there.h.at(1, 2, i)));
    }
  }
}

VV_TEST(rows_do_not_depend_on_the_threads) {
  constexpr int64_t kMany = 6000, kWidth = 401;  // enough work for several threads, pieces that do not divide it
  Tensor<float> hidden(1, kMany, kWidth), scale(1, 1, kWidth), first(1, kMany, kWidth), second(1, kMany, kWidth);
  Random random(3);
  hidden.fill(random), scale.fill(random);
  for (Tensor<float>* out : {&first, &second}) {
    const RowShape shape{1, kMany, kWidth};
    NormModulateArgs args{hidden.rows(), scale.by_sample(), {}, {}, {}, out->rows(), shape, true, kEps};
    norm_modulate(args, out == &first ? 1 : 4);
  }
  bool equal = true;
  for (int64_t i = 0; i < first.buffer.size(); ++i)
    equal = equal && same(first.buffer.data()[i], second.buffer.data()[i]);
  CHECK(equal);
}

VV_TEST(illegal_calls_over_rows_are_refused) {
  Problem<float> one(16, 0, 1);
  const auto refused = [&](auto change) {
    AdalnModulateArgs args = one.args(true, true);
    change(args);
    return refusal([&] { adaln_modulate(args, 1); });
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(refused([](auto&) {}).empty());
  CHECK(has(refused([](auto& a) { a.residual.hidden.data = nullptr; }), "hidden has no memory"));
  CHECK(has(refused([](auto& a) { a.norm.out.data = nullptr; }), "out has no memory"));
  CHECK(has(refused([](auto& a) { a.norm.out = a.residual.out; }), "same memory"));
  CHECK(has(refused([](auto& a) { a.residual.update.dtype = Dtype::kBfloat16; }), "update has another dtype"));
  CHECK(has(refused([](auto& a) { a.norm.scale.dtype = Dtype::kFloat16; }), "scale has another dtype"));
  CHECK(has(refused([](auto& a) { a.norm.hidden.dtype = Dtype::kFloat16; }), "neither float32"));
  CHECK(has(refused([](auto& a) { a.residual.shape.tokens = -1; }), "is negative"));
  CHECK(has(refused([](auto& a) { a.norm.shape.width = int64_t{1} << 60; }), "fits no memory"));
  CHECK(has(refused([](auto& a) { a.norm.eps = -1.0; }), "eps"));
  CHECK(has(refused([](auto& a) { a.norm.eps = NAN; }), "eps"));
  CHECK(refused([](auto& a) { a.residual.shape.batch = 0, a.residual.hidden.data = nullptr; }).empty());
}

}  // namespace
}  // namespace vivace::test
