// Linears against their definition, in the order in which the kernels sum: every size of strip, panel and block, every
// layout and operand; what must not change a bit, and what must be refused.
#include "ops/linear.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

float get(const float* p) { return *p; }
float get(const uint16_t* p) { return widen(*p, Dtype::kBfloat16); }
void set(float* p, float x) { *p = x; }
void set(uint16_t* p, float x) { *p = static_cast<uint16_t>(bits(stored(x, Dtype::kBfloat16)) >> 16); }

template <typename T>
constexpr Dtype kDtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kBfloat16;

struct Sizes {
  int64_t batch, tokens, columns, depth;
};

// Matrices with gaps between rows and between samples, all ending where their memory ends.
template <typename T, typename Out>
struct Problem {
  Problem(Sizes s, int64_t gap, uint64_t seed)
      : s(s),
        gap(gap),
        x(memory(s.depth), 1),
        weight(s.columns * (s.depth + gap) - gap, 3),
        packed(packed_bytes(s.columns, s.depth, kDtype<T>) / static_cast<int64_t>(sizeof(T)), 0),
        bias(s.columns, 1),
        gate(memory(s.columns), 1),
        residual(memory(s.columns), 1),
        out(memory(s.columns), 1) {
    Random random(seed);
    const auto fill = [&](auto& buffer, float scale) {
      for (int64_t i = 0; i < buffer.size(); ++i)
        set(buffer.data() + i, static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-31f * scale);
    };
    fill(x, 2.0f), fill(weight, 1.0f), fill(bias, 1.0f), fill(gate, 1.0f), fill(residual, 4.0f), fill(out, 1.0f);
    pack_matrix(packed.data(), weight.data(), s.columns, s.depth, s.depth + gap, kDtype<T>, 1);
  }

  int64_t row(int64_t width) const { return width + gap; }
  int64_t sample(int64_t width) const { return s.tokens * row(width) + 2 * gap; }
  int64_t memory(int64_t width) const { return s.batch * sample(width) - 3 * gap; }
  template <typename E>
  RowTensor rows(Buffer<E>& buffer, int64_t width) {
    return {buffer.data(), kDtype<E>, sample(width), row(width)};
  }

  LinearArgs args(Activation activation, bool gated, bool added) {
    return {rows(x, s.depth),
            {packed.data(), s.columns, s.depth, kDtype<T>},
            bias.data(),
            activation,
            gated ? rows(gate, s.columns) : RowTensor{},
            added ? rows(residual, s.columns) : RowTensor{},
            rows(out, s.columns),
            {s.batch, s.tokens, s.depth}};
  }

  // The sum of a result in the order of the kernels: blocks of depth, in bfloat16 the second of a pair first.
  float sum(int64_t b, int64_t n, int64_t column) const {
    constexpr int64_t kBlock = sizeof(T) == 4 ? 512 : 1024, kPair = 4 / sizeof(T);
    const T *a = x.data() + b * sample(s.depth) + n * row(s.depth), *w = weight.data() + column * row(s.depth);
    float total = 0.0f;
    for (int64_t begin = 0; begin < s.depth; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, s.depth);
      float part = 0.0f;
      for (int64_t k = begin; k < end; k += kPair) {
        for (int64_t j = std::min(k + kPair, end) - 1; j >= k; --j) part = std::fma(get(a + j), get(w + j), part);
      }
      total = begin == 0 ? part : total + part;
    }
    return total;
  }
  Out expected(int64_t b, int64_t n, int64_t column, bool gated, bool added) const {
    const int64_t at = b * sample(s.columns) + n * row(s.columns) + column;
    float y = sum(b, n, column) + bias.data()[column];
    if (gated) y = y * gate.data()[at];
    if (added) y = get(residual.data() + at) + y;
    Out rounded;
    set(&rounded, y);
    return rounded;
  }

  bool matches(bool gated, bool added) const {
    bool equal = true;
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t n = 0; n < s.tokens; ++n) {
        for (int64_t i = 0; i < s.columns; ++i) {
          const Out want = expected(b, n, i, gated, added);
          equal = equal && same(get(out.data() + b * sample(s.columns) + n * row(s.columns) + i), get(&want));
        }
      }
    }
    return equal;
  }

  Sizes s;
  int64_t gap;
  Buffer<T> x, weight, packed;
  Buffer<float> bias, gate;
  Buffer<Out> residual, out;
};

std::string text(Sizes s) {
  return std::to_string(s.batch) + "x" + std::to_string(s.tokens) + " " + std::to_string(s.depth) + " to " +
         std::to_string(s.columns);
}

template <typename T, typename Out>
void check_sizes() {
  uint64_t seed = 0;
  const auto run = [&](Sizes s, int64_t gap, bool gated, bool added) {
    Problem<T, Out> one(s, gap, ++seed);
    linear(one.args(Activation::kNone, gated, added), 1);
    CHECK_IN(one.matches(gated, added), text(s));
  };
  for (int64_t rows = 1; rows <= 13; ++rows) run({1, rows, 16 + rows * 9, 20 + rows}, rows % 3, rows & 1, rows & 2);
  for (const int64_t columns : {1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 128, 130})
    run({2, 3, columns, 33}, columns % 2, true, true);
  for (const int64_t depth : {1, 2, 3, 511, 512, 513, 1023, 1024, 1025, 1540}) run({1, 2, 20, depth}, 0, false, false);
  run({1, 48, 64, 8}, 0, false, true);
  run({1, 49, 64, 8}, 0, true, false);
  run({3, 100, 70, 7}, 2, true, true);
  run({60, 1, 70, 7}, 1, true, true);
}

VV_TEST(linear_of_float32_has_the_bits_of_its_definition) { check_sizes<float, float>(); }
VV_TEST(linear_of_bfloat16_has_the_bits_of_its_definition) { check_sizes<uint16_t, uint16_t>(); }
VV_TEST(linear_may_have_another_dtype_than_its_inputs) {
  check_sizes<uint16_t, float>();
  check_sizes<float, uint16_t>();
}

double activated(Activation activation, double x) {
  if (activation == Activation::kGelu) return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
  if (activation == Activation::kGeluTanh)
    return x / (1.0 + std::exp(-2.0 * std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
  return activation == Activation::kSilu ? x / (1.0 + std::exp(-x)) : x;
}

VV_TEST(linear_applies_the_activation_to_sum_and_bias) {
  for (const Activation activation : {Activation::kGelu, Activation::kGeluTanh, Activation::kSilu}) {
    for (const int64_t columns : {64, 37}) {
      Problem<float, float> one({1, 7, columns, 40}, 0, 5);
      linear(one.args(activation, true, false), 1);
      for (int64_t i = 0; i < 7 * columns; ++i) {
        const double y = one.sum(0, i / columns, i % columns) + one.bias.data()[i % columns];
        const double want = activated(activation, y) * one.gate.data()[i];
        CHECK(std::fabs(one.out.data()[i] - want) <= 4e-6);
      }
    }
  }
}

VV_TEST(a_gate_may_be_shared_and_out_may_be_the_residual) {
  Problem<float, float> apart({2, 5, 70, 24}, 0, 6), place({2, 5, 70, 24}, 0, 6);
  LinearArgs a = apart.args(Activation::kSilu, true, true), b = place.args(Activation::kSilu, true, true);
  a.gate.token_stride = b.gate.token_stride = 0;
  b.out = b.residual;
  linear(a, 1);
  linear(b, 1);
  bool equal = true;
  for (int64_t i = 0; i < apart.out.size(); ++i) equal = equal && same(apart.out.data()[i], place.residual.data()[i]);
  CHECK(equal);
}

VV_TEST(a_row_alone_has_the_bits_it_has_among_others) {
  Problem<uint16_t, float> all({1, 61, 100, 75}, 0, 7);
  linear(all.args(Activation::kGelu, true, true), 2);
  for (int64_t n = 0; n < 61; ++n) {
    Problem<uint16_t, float> one({1, 61, 100, 75}, 0, 7);
    LinearArgs args = one.args(Activation::kGelu, true, true);
    args.shape.tokens = 1;
    args.x.data = one.x.data() + n * 75;
    args.gate.data = one.gate.data() + n * 100;
    args.residual.data = one.residual.data() + n * 100;
    linear(args, 1);
    for (int64_t i = 0; i < 100; ++i) CHECK(same(one.out.data()[i], all.out.data()[n * 100 + i]));
  }
}

VV_TEST(linear_does_not_depend_on_the_threads) {
  Problem<float, float> one({2, 300, 200, 600}, 1, 8), many({2, 300, 200, 600}, 1, 8);
  linear(one.args(Activation::kNone, true, false), 1);
  linear(many.args(Activation::kNone, true, false), 4);
  bool equal = true;
  for (int64_t i = 0; i < one.out.size(); ++i) equal = equal && same(one.out.data()[i], many.out.data()[i]);
  CHECK(equal);
}

VV_TEST(tasks_in_any_order_make_the_whole) {
  Problem<uint16_t, uint16_t> whole({2, 53, 150, 31}, 1, 9), pieces({2, 53, 150, 31}, 1, 9);
  linear(whole.args(Activation::kGelu, true, true), 1);
  const LinearArgs args = pieces.args(Activation::kGelu, true, true);
  Buffer<float> scratch(linear_scratch(args), 0);
  for (int64_t task = linear_tasks(args) - 1; task >= 0; --task) linear_task(args, task, scratch.data());
  CHECK(std::equal(whole.out.data(), whole.out.data() + whole.out.size(), pieces.out.data()));
}

VV_TEST(what_a_row_lacks_does_not_reach_its_results) {  // the pair beyond an odd depth, and the columns of the padding
  Problem<uint16_t, float> one({1, 2, 3, 5}, 1, 10);
  const auto sum = one.sum(0, 0, 0);
  set(one.x.data() + 5, NAN);
  linear(one.args(Activation::kNone, false, false), 1);
  CHECK(same(one.out.data()[0], sum + one.bias.data()[0]) && std::isfinite(one.out.data()[2]));
}

VV_TEST(illegal_linears_are_refused) {
  Problem<float, float> one({1, 2, 20, 16}, 0, 1);
  const auto refused = [&](auto change) {
    LinearArgs args = one.args(Activation::kNone, true, true);
    change(args);
    return refusal([&] { linear(args, 1); });
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(refused([](auto&) {}).empty());
  CHECK(has(refused([](auto& a) { a.x.data = nullptr; }), "x has no memory"));
  CHECK(has(refused([](auto& a) { a.out.data = nullptr; }), "out has no memory"));
  CHECK(has(refused([](auto& a) { a.weight.data = nullptr; }), "weight has no memory"));
  CHECK(has(refused([](auto& a) { a.weight.data = static_cast<const float*>(a.weight.data) + 1; }), "not aligned"));
  CHECK(has(refused([](auto& a) { a.weight.depth = 17; }), "needs 17 as the packed weight"));
  CHECK(has(refused([](auto& a) { a.weight.columns = -1; }), "is negative"));
  CHECK(has(refused([](auto& a) { a.weight.columns = int64_t{1} << 58; }), "fits no memory"));
  CHECK(has(refused([](auto& a) { a.weight.dtype = Dtype::kFloat16; }), "none of float32, bfloat16 and int8"));
  CHECK(has(refused([](auto& a) { a.weight.dtype = Dtype::kBfloat16; }), "x has another dtype"));
  CHECK(has(refused([](auto& a) { a.gate.dtype = Dtype::kBfloat16; }), "gate has another dtype"));
  CHECK(has(refused([](auto& a) { a.residual.dtype = Dtype::kBfloat16; }), "residual has another dtype"));
  CHECK(has(refused([](auto& a) { a.out.dtype = Dtype::kFloat16; }), "out is neither"));
  CHECK(has(refused([](auto& a) { a.activation = static_cast<Activation>(4); }), "activation 4 is unknown"));
  CHECK(has(refused([](auto& a) { a.shape.tokens = -1; }), "is negative"));
  CHECK(refused([](auto& a) { a.shape.tokens = 0, a.x.data = nullptr; }).empty());
}

}  // namespace
}  // namespace vivace::test
