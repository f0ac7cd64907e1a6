// Rows as 8-bit integers against the definition with its division, bit for bit: every width and dtype, scales and
// quotients next to ties, rows that have no scale; and behind a norm, where they are those of the two ops.
#include "ops/quantize_tokens.h"

#include <cmath>
#include <string>
#include <vector>

#include "ops/int8_norm_modulate.h"
#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

constexpr int64_t kWidths[] = {1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 123, 128, 200, 384};
constexpr double kEps = 1e-6;

float stored_as(float x, Dtype dtype) { return dtype == Dtype::kFloat32 ? x : stored(x, dtype); }

// `rows` rows of one sample each, with a gap, as floats and as they are stored.
struct Problem {
  Problem(int64_t rows, int64_t width, Dtype dtype, bool smooth)
      : rows(rows), width(width), stride(width + 3), dtype(dtype), smoothed(smooth) {
    wide.resize(static_cast<size_t>(rows * stride - 3)), given.resize(static_cast<size_t>(rows));
    factors.resize(static_cast<size_t>(width), 1.0f);
  }

  float& at(int64_t row, int64_t i) { return wide[static_cast<size_t>(row * stride + i)]; }

  void fill(Random& random) {
    for (float& x : wide) {
      const float tame = static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-28f;
      x = random.below(2000) == 0 ? random.value() : tame;
    }
    for (float& x : factors) x = static_cast<float>(random.word()) * 0x1p-31f;
    for (float& x : given) x = random.below(3) == 0 ? 0.0f : static_cast<float>(random.word()) * 0x1p-36f;
  }

  // Where the rows lie; the last one ends where memory ends.
  RowTensor store() {
    for (float& x : wide) x = stored_as(x, dtype);
    halves.clear();
    for (const float x : wide) halves.push_back(static_cast<uint16_t>(bits(x) >> 16));
    void* data = dtype == Dtype::kFloat32 ? static_cast<void*>(wide.data()) : halves.data();
    return {data, dtype, stride, stride};
  }

  QuantizeTokensArgs args(bool fixed) {
    return {
        store(),         smoothed ? factors.data() : nullptr, fixed ? given.data() : nullptr, q.data(), scale.data(),
        {rows, 1, width}};
  }

  // Whether q and scale are those of `x` [rows, width].
  bool right(const std::vector<float>& x, bool fixed) {
    bool equal = true;
    for (int64_t n = 0; n < rows; ++n) {
      std::vector<float> y;
      float most = 0.0f;
      bool finite = true;
      for (int64_t i = 0; i < width; ++i) {
        const float v = x[static_cast<size_t>(n * width + i)];
        y.push_back(smoothed ? v * factors[static_cast<size_t>(i)] : v);
        most = std::fmax(most, std::fabs(y.back()));
        finite = finite && std::isfinite(y.back());
      }
      float step = most / 127.0f;
      if (step == 0.0f) step = 1.0f;
      if (fixed && given[static_cast<size_t>(n)] > 0.0f) step = given[static_cast<size_t>(n)];
      equal = equal && same(scale.data()[n], finite ? step : NAN);
      for (int64_t i = 0; i < width; ++i) {
        const float whole = std::nearbyint(y[static_cast<size_t>(i)] / step);
        const float cut = finite ? std::fmin(std::fmax(whole, -127.0f), 127.0f) : 0.0f;
        equal = equal && q.data()[n * width + i] == static_cast<int8_t>(cut);
      }
    }
    return equal;
  }

  bool right(bool fixed) {
    std::vector<float> x;
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t i = 0; i < width; ++i) x.push_back(at(n, i));
    }
    return right(x, fixed);
  }

  int64_t rows, width, stride;
  Dtype dtype;
  bool smoothed;
  std::vector<float> wide, factors, given;
  std::vector<uint16_t> halves;
  Buffer<int8_t> q{rows * width, 1};
  Buffer<float> scale{rows, 1};
};

VV_TEST(quantized_rows_have_the_bits_of_the_definition) {
  Random random(1);
  for (const int64_t width : kWidths) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBfloat16}) {
      for (const bool smooth : {false, true}) {
        for (const bool fixed : {false, true}) {
          Problem one(9, width, dtype, smooth);
          one.fill(random);
          quantize_tokens(one.args(fixed), 1);
          CHECK_IN(one.right(fixed), std::to_string(width) + (smooth ? " smooth" : "") + (fixed ? " given" : ""));
        }
      }
    }
  }
}

// The integers of the floats next to every tie k + 1/2 times a scale: its own, and given.
void check_next_to_ties(float step) {
  Problem one(1, 127 * 6, Dtype::kFloat32, false);
  one.given[0] = step;
  for (int64_t k = 0; k < 127; ++k) {
    float x = (static_cast<float>(k) + 0.5f) * step;
    x = std::nextafter(std::nextafter(x, 0.0f), 0.0f);
    for (int64_t j = 0; j < 6; ++j, x = std::nextafter(x, INFINITY)) one.at(0, 6 * k + j) = (k + j) % 2 ? x : -x;
  }
  quantize_tokens(one.args(true), 1);
  CHECK(one.right(true));
  one.at(0, 0) = 127.0f * step;
  quantize_tokens(one.args(false), 1);
  CHECK(one.right(false));
}

// The mantissas for which ops/quantize_tokens.inl leaves this to be tried, and others.
VV_TEST(quotients_next_to_ties_are_rounded_as_division_does) {
  for (uint32_t middle = 1u << 23; middle <= 1u << 24; middle += 1u << 17) {
    for (uint32_t mantissa = middle - 5; mantissa <= middle + 5; ++mantissa)
      check_next_to_ties(std::ldexp(static_cast<float>(mantissa), -30));
  }
  Random random(2);
  for (int round = 0; round < 200; ++round)
    check_next_to_ties(std::ldexp(1.0f + static_cast<float>(random.word() >> 9) * 0x1p-23f, random.below(60) - 30));
}

VV_TEST(rows_at_the_ends_of_float32_are_quantized) {
  const float odd[] = {0.0f, -0.0f, 0x1p-149f, 0x1.8p-140f, -0x1p-126f, 0x1.fffffep+127f, -0x1p+127f, NAN, -INFINITY};
  for (const float first : odd) {
    for (const float second : odd) {
      for (const float fixed : {0.0f, -1.0f, 0x1p-149f, 0x1p-130f, 0x1.23456p-110f, 0.0123f, 0x1.1p+120f, INFINITY}) {
        Problem one(1, 37, Dtype::kFloat32, false);
        one.at(0, 3) = first, one.at(0, 36) = second, one.at(0, 20) = first;
        one.given[0] = fixed;
        quantize_tokens(one.args(true), 1);
        CHECK(one.right(true));
      }
    }
  }
}

VV_TEST(a_norm_into_integers_is_the_two_ops) {
  Random random(3);
  for (const int64_t width : kWidths) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBfloat16}) {
      for (int kind = 0; kind < 16; ++kind) {
        const bool centred = kind & 1, smooth = kind & 2, fixed = kind & 4, modulated = kind & 8;
        Problem one(7, width, dtype, smooth), vectors(2, width, Dtype::kFloat32, false);
        one.fill(random), vectors.fill(random);
        one.args(false);
        std::vector<float> rows;
        for (int64_t n = 0; n < one.rows; ++n) {
          for (int64_t i = 0; i < width; ++i) rows.push_back(one.at(n, i));
        }
        std::vector<float> y(rows.size());
        const RowShape shape{7, 1, width};
        const RowTensor scale{vectors.wide.data(), Dtype::kFloat32, 0, 0};
        const RowTensor shift{vectors.wide.data() + vectors.stride, Dtype::kFloat32, 0, 0};
        NormModulateArgs norm{{rows.data(), Dtype::kFloat32, width, width}, {},    {},      {},  {},
                              {y.data(), Dtype::kFloat32, width, width},    shape, centred, kEps};
        if (modulated) norm.scale = scale, norm.shift = shift;
        norm_modulate(norm, 1);
        norm.hidden = one.store(), norm.out = {};
        const QuantizeTokensArgs to = one.args(fixed);
        int8_norm_modulate({norm, to.smooth, to.given, to.q, to.scale}, 1);
        CHECK_IN(one.right(y, fixed), std::to_string(width) + ": " + std::to_string(kind));
      }
    }
  }
}

VV_TEST(integers_do_not_depend_on_the_threads) {
  constexpr int64_t kMany = 6000, kWidth = 401;
  Random random(4);
  Problem one(kMany, kWidth, Dtype::kBfloat16, true);
  one.fill(random);
  QuantizeTokensArgs args = one.args(true);
  const float fixed = one.given[1];
  args.shape = {1, kMany, kWidth};
  for (float& scale : one.given) scale = fixed;
  args.given = &fixed;
  quantize_tokens(args, 4);
  CHECK(one.right(true));
  const NormModulateArgs norm{args.x, {}, {}, {}, {}, {}, args.shape, true, kEps};
  Buffer<int8_t> first(kMany * kWidth, 1);
  Buffer<float> scale(kMany, 1);
  int8_norm_modulate({norm, args.smooth, nullptr, first.data(), scale.data()}, 1);
  int8_norm_modulate({norm, args.smooth, nullptr, args.q, args.scale}, 4);
  bool equal = true;
  for (int64_t i = 0; i < first.size(); ++i) equal = equal && first.data()[i] == args.q[i];
  for (int64_t i = 0; i < kMany; ++i) equal = equal && same(scale.data()[i], args.scale[i]);
  CHECK(equal);
}

VV_TEST(illegal_calls_for_integers_are_refused) {
  Problem one(2, 16, Dtype::kFloat32, true);
  const auto refused = [&](auto change) {
    QuantizeTokensArgs args = one.args(true);
    change(args);
    const NormModulateArgs norm{args.x, {}, {}, {}, {}, {}, args.shape, true, kEps};
    const std::string text =
        refusal([&] { int8_norm_modulate({norm, args.smooth, args.given, args.q, args.scale}, 1); });
    const std::string alone = refusal([&] { quantize_tokens(args, 1); });
    CHECK(text.empty() == alone.empty());
    return alone;
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(refused([](auto&) {}).empty());
  CHECK(has(refused([](auto& a) { a.x.data = nullptr; }), "x has no memory"));
  CHECK(has(refused([](auto& a) { a.q = nullptr; }), "q has no memory"));
  CHECK(has(refused([](auto& a) { a.scale = nullptr; }), "scale has no memory"));
  CHECK(has(refused([](auto& a) { a.x.dtype = Dtype::kInt8; }), "neither float32"));
  CHECK(has(refused([](auto& a) { a.shape.batch = -1; }), "is negative"));
  CHECK(refused([](auto& a) { a.shape.batch = 0, a.q = nullptr; }).empty());
}

}  // namespace
}  // namespace vivace::test
