// Linears of 8-bit integers: exact sums on every instruction set at the extremes, every size of strip and panel, rows
// that are quantized in the call, and what must be refused.
#include "ops/int8_linear.h"

#include <cmath>
#include <string>
#include <vector>

#include "ops/quantize_tokens.h"

#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

struct Problem {
  Problem(int64_t rows, int64_t columns, int64_t depth, int64_t gap, uint64_t seed)
      : rows(rows),
        columns(columns),
        depth(depth),
        gap(gap),
        x(rows * (depth + gap) - gap, 1),
        weight(columns * depth, 3),
        packed(packed_bytes(columns, depth, Dtype::kInt8), 0),
        x_scale(rows, 1),
        weight_scale(columns, 1),
        bias(columns, 1),
        out(rows * columns, 1) {
    Random random(seed);
    const auto integers = [&](Buffer<int8_t>& buffer) {
      for (int64_t i = 0; i < buffer.size(); ++i) buffer.data()[i] = static_cast<int8_t>(random.word());
    };
    const auto floats = [&](Buffer<float>& buffer) {
      for (int64_t i = 0; i < buffer.size(); ++i)
        buffer.data()[i] = static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-31f;
    };
    integers(x), integers(weight), floats(x_scale), floats(weight_scale), floats(bias);
  }

  Int8LinearArgs args() {
    pack_matrix(packed.data(), weight.data(), columns, depth, depth, Dtype::kInt8, 1);
    Int8LinearArgs a{};
    a.x = {x.data(), Dtype::kInt8, rows * (depth + gap), depth + gap};
    a.x_scale = x_scale.data();
    a.weight = {packed.data(), columns, depth, Dtype::kInt8};
    a.weight_scale = weight_scale.data();
    a.bias = bias.data();
    a.out = {out.data(), Dtype::kFloat32, rows * columns, columns};
    a.shape = {1, rows, depth};
    return a;
  }

  bool matches() const {
    bool equal = true;
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t i = 0; i < columns; ++i) {
        int64_t sum = 0;
        for (int64_t k = 0; k < depth; ++k) sum += x.data()[n * (depth + gap) + k] * weight.data()[i * depth + k];
        const float y = static_cast<float>(sum) * x_scale.data()[n] * weight_scale.data()[i] + bias.data()[i];
        equal = equal && same(y, out.data()[n * columns + i]);
      }
    }
    return equal;
  }

  int64_t rows, columns, depth, gap;
  Buffer<int8_t> x, weight, packed;
  Buffer<float> x_scale, weight_scale, bias, out;
};

VV_TEST(int8_linear_has_the_bits_of_its_definition) {
  uint64_t seed = 0;
  const auto run = [&](int64_t rows, int64_t columns, int64_t depth, int64_t gap) {
    Problem one(rows, columns, depth, gap, ++seed);
    int8_linear(one.args(), 1);
    CHECK_IN(one.matches(), std::to_string(rows) + ": " + std::to_string(depth) + " to " + std::to_string(columns));
  };
  for (int64_t rows = 1; rows <= 13; ++rows) run(rows, 16 + 9 * rows, 20 + rows, rows % 3);
  for (const int64_t columns : {1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 130}) run(5, columns, 33, 1);
  for (const int64_t depth : {1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 1024}) run(3, 20, depth, 0);
  run(100, 70, 12, 2);
}

VV_TEST(int8_sums_are_exact_at_the_extremes) {
  for (const int x : {-128, 127}) {
    for (const int w : {-128, 127}) {
      for (const int64_t depth : {int64_t{4}, int64_t{4099}, kMostInt8Depth}) {
        Problem one(2, 17, depth, 0, 1);
        for (int64_t i = 0; i < one.x.size(); ++i) one.x.data()[i] = static_cast<int8_t>(x);
        for (int64_t i = 0; i < one.weight.size(); ++i) one.weight.data()[i] = static_cast<int8_t>(w);
        int8_linear(one.args(), 1);
        CHECK(one.matches());
      }
    }
  }
}

VV_TEST(int8_linear_does_not_depend_on_the_threads) {
  Problem one(500, 200, 640, 1, 2), many(500, 200, 640, 1, 2);
  int8_linear(one.args(), 1);
  int8_linear(many.args(), 4);
  bool equal = true;
  for (int64_t i = 0; i < one.out.size(); ++i) equal = equal && same(one.out.data()[i], many.out.data()[i]);
  CHECK(equal);
}

// Rows of numbers: one of zeros, one with NaN, the others ordinary; `gap` unused elements between them.
template <typename T>
Buffer<T> numbers(int64_t rows, int64_t depth, int64_t gap) {
  Random random(9);
  Buffer<T> x(rows * (depth + gap), 1);
  for (int64_t i = 0; i < x.size(); ++i) {
    const float y = static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-30f;
    const int64_t row = i / (depth + gap);
    const float value = row == 1 ? 0.0f : row == 2 && i % (depth + gap) == depth - 1 ? std::nanf("") : y;
    if constexpr (sizeof(T) == 4) {
      x.data()[i] = value;
    } else {
      uint32_t bits;
      memcpy(&bits, &value, sizeof(bits));
      x.data()[i] = static_cast<T>(bits >> 16);
    }
  }
  return x;
}

// Quantized in the call, and before it.
template <typename T>
void quantized_either_way(int64_t rows, int64_t columns, int64_t depth, int64_t gap, bool smoothed, int64_t threads) {
  Problem one(rows, columns, depth, 0, 3), two(rows, columns, depth, 0, 3);
  const Buffer<T> x = numbers<T>(rows, depth, gap);
  Buffer<float> smooth(depth, 1);
  for (int64_t i = 0; i < depth; ++i) smooth.data()[i] = 0.5f + static_cast<float>(i % 7);
  const Dtype dtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kBfloat16;
  const RowTensor source{const_cast<T*>(x.data()), dtype, rows * (depth + gap), depth + gap};
  const float* factor = smoothed ? smooth.data() : nullptr;
  quantize_tokens({source, factor, nullptr, one.x.data(), one.x_scale.data(), {1, rows, depth}}, 1);
  int8_linear(one.args(), 1);
  Int8LinearArgs args = two.args();
  args.x = source, args.x_scale = nullptr, args.smooth = factor;
  int8_linear(args, threads);
  CHECK(one.matches() || rows > 2);  // NaN has no one bit pattern
  for (int64_t i = 0; i < one.out.size(); ++i) {
    const float a = one.out.data()[i], b = two.out.data()[i];
    if (!CHECK_IN(std::isnan(a) == (i / columns == 2) && (same(a, b) || (std::isnan(a) && std::isnan(b))),
                  std::to_string(i)))
      return;
  }
}

VV_TEST(rows_quantized_in_the_call_have_the_bits_of_those_quantized_before_it) {
  for (const int64_t depth : {1, 3, 33, 64, 515}) {
    for (const bool smoothed : {false, true}) {
      quantized_either_way<float>(7, 70, depth, 0, smoothed, 1);
      quantized_either_way<uint16_t>(7, 33, depth, 3, smoothed, 1);
    }
  }
  quantized_either_way<float>(2, 16, 40, 0, true, 1);
  quantized_either_way<uint16_t>(500, 200, 640, 1, true, 4);
}

VV_TEST(illegal_int8_linears_are_refused) {
  Problem one(2, 20, 16, 0, 1);
  const auto refused = [&](auto change) {
    Int8LinearArgs args = one.args();
    change(args);
    return refusal([&] { int8_linear(args, 1); });
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(refused([](auto&) {}).empty());
  CHECK(has(refused([](auto& a) { a.x.data = nullptr; }), "x has no memory"));
  CHECK(has(refused([](auto& a) { a.x.dtype = Dtype::kFloat32; }), "x_scale is for x of int8"));
  CHECK(has(refused([](auto& a) { a.x.dtype = Dtype::kFloat16, a.x_scale = nullptr; }), "x is neither"));
  CHECK(has(refused([](auto& a) { a.smooth = a.bias; }), "smooth is for x that is to be quantized"));
  CHECK(has(refused([](auto& a) { a.x = {nullptr, Dtype::kFloat32, 0, 0}, a.x_scale = nullptr; }), "x has no memory"));
  CHECK(has(refused([](auto& a) { a.x_scale = nullptr; }), "a scale has no memory"));
  CHECK(has(refused([](auto& a) { a.weight_scale = nullptr; }), "a scale has no memory"));
  CHECK(has(refused([](auto& a) { a.weight.dtype = Dtype::kFloat32; }), "weight is not packed int8"));
  CHECK(has(refused([](auto& a) { a.weight.depth = 17; }), "needs 17 as the packed weight"));
  CHECK(has(refused([](auto& a) { a.weight.depth = a.shape.width = kMostInt8Depth + 1; }), "needs at most"));
  CHECK(has(refused([](auto& a) { a.out.dtype = Dtype::kInt8; }), "out is neither"));
  CHECK(refused([](auto& a) { a.shape.tokens = 0; }).empty());
  for (const int code : {2, 4, -1}) {
    CHECK(has(refusal([&] { run_products(static_cast<Dtype>(code), 1, 1); }), "is none of float32, bfloat16 and int8"));
    CHECK(has(refusal([&] { packed_bytes(4, 4, static_cast<Dtype>(code)); }), "is none of float32, bfloat16 and int8"));
  }
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBfloat16, Dtype::kInt8}) CHECK(run_products(dtype, 2, 1) > 0);
}

}  // namespace
}  // namespace vivace::test
