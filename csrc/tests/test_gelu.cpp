// GELU against the error function in double, at every width, in and out of place, with what it must refuse.
#include "ops/gelu.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

double exact(double x, bool tanh) {
  if (!tanh) return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
  return x / (1.0 + std::exp(-2.0 * std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

float get(const float* p) { return *p; }
float get(const uint16_t* p) { return widen(*p, Dtype::kBfloat16); }
void set(float* p, float x) { *p = x; }
void set(uint16_t* p, float x) { *p = static_cast<uint16_t>(bits(stored(x, Dtype::kBfloat16)) >> 16); }

// Two rows of values and gates with a gap between them, ending where their memory ends.
template <typename T>
struct Problem {
  Problem(int64_t width, int64_t gap, uint64_t seed)
      : width(width), stride(2 * width + gap), pairs(2 * stride - gap, 1), out(2 * width, 3) {
    Random random(seed + static_cast<uint64_t>(width));
    for (int64_t i = 0; i < pairs.size(); ++i)
      set(pairs.data() + i, static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-29f);
  }

  RowTensor rows(T* p, int64_t step) {
    return {p, sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kBfloat16, 2 * step, step};
  }
  GeluArgs args(bool gated, bool tanh) {
    const RowTensor gate = gated ? rows(pairs.data() + width, stride) : RowTensor{};
    return {rows(pairs.data(), stride), gate, rows(out.data(), width), {1, 2, width}, tanh};
  }
  double expected(int64_t row, int64_t i, bool gated, bool tanh) const {
    const double x = get(pairs.data() + row * stride + i);
    return gated ? x * exact(get(pairs.data() + row * stride + width + i), tanh) : exact(x, tanh);
  }

  int64_t width, stride;
  Buffer<T> pairs, out;
};

template <typename T>
void check_all(const char* name, double relative, double absolute) {
  for (const int64_t width : {1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 1000}) {
    for (const int64_t gap : {0, 5}) {
      for (const int form : {0, 1, 2, 3}) {
        const bool gated = form & 1, tanh = form & 2;
        Problem<T> one(width, gap, 1);
        gelu(one.args(gated, tanh), 1);
        for (int64_t i = 0; i < 2 * width; ++i) {
          const double want = one.expected(i / width, i % width, gated, tanh);
          const double off = std::fabs(get(one.out.data() + i) - want);
          CHECK_IN(off <= relative * std::fabs(want) + absolute, std::string(name) + std::to_string(width));
        }
      }
    }
  }
}

VV_TEST(gelu_of_float32_is_that_of_double) { check_all<float>("float32 ", 1e-6, 4e-6); }
VV_TEST(gelu_of_bfloat16_is_that_of_double) { check_all<uint16_t>("bfloat16 ", 0x1p-8, 5e-5); }

VV_TEST(gelu_does_not_depend_on_place_or_neighbours) {
  for (const bool tanh : {false, true}) {
    Problem<float> all(333, 0, 2), there(333, 0, 2);
    gelu(all.args(true, tanh), 1);
    GeluArgs in_place = there.args(true, tanh);
    in_place.out = in_place.hidden;
    gelu(in_place, 1);
    for (int64_t i = 0; i < 666; ++i) {
      Problem<float> one(1, 0, 2);
      for (const int64_t half : {0, 1})
        one.pairs.data()[half] = all.pairs.data()[i / 333 * all.stride + half * 333 + i % 333];
      gelu(one.args(true, tanh), 1);
      CHECK(same(one.out.data()[0], all.out.data()[i]));
      CHECK(same(there.pairs.data()[i / 333 * there.stride + i % 333], all.out.data()[i]));
    }
  }
}

VV_TEST(gelu_keeps_its_tails) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const bool tanh : {false, true}) {
    for (const int64_t width : {1, 64}) {
      Buffer<float> x(width, 0), y(width, 0);
      const auto of = [&](float value) {
        for (int64_t i = 0; i < width; ++i) x.data()[i] = value;
        const RowTensor in{x.data(), Dtype::kFloat32, 0, 0}, to{y.data(), Dtype::kFloat32, 0, 0};
        gelu({in, {}, to, {1, 1, width}, tanh}, 1);
        return y.data()[width - 1];
      };
      CHECK(of(kInfinity) == kInfinity && std::isnan(of(-kInfinity)) && std::isnan(of(NAN)));
      for (const float large : {20.0f, 1e10f, 1e30f, 3.4e38f}) {
        CHECK(of(large) == large && std::fabs(of(-large)) < 1e-30f && std::signbit(of(-large)));
      }
      CHECK(bits(of(0.0f)) == 0 && bits(of(-0.0f)) == 0x80000000u);
    }
  }
}

VV_TEST(gelu_does_not_depend_on_the_threads) {
  Problem<uint16_t> one(300007, 0, 4), many(300007, 0, 4);
  gelu(one.args(false, false), 1);
  gelu(many.args(false, false), 4);
  bool equal = true;
  for (int64_t i = 0; i < one.out.size(); ++i) equal = equal && one.out.data()[i] == many.out.data()[i];
  CHECK(equal);
}

VV_TEST(illegal_calls_of_gelu_are_refused) {
  Problem<float> one(16, 0, 1);
  const auto refused = [&](auto change) {
    GeluArgs args = one.args(true, false);
    change(args);
    return refusal([&] { gelu(args, 1); });
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(refused([](auto&) {}).empty());
  CHECK(has(refused([](auto& a) { a.hidden.data = nullptr; }), "hidden has no memory"));
  CHECK(has(refused([](auto& a) { a.out.data = nullptr; }), "out has no memory"));
  CHECK(has(refused([](auto& a) { a.gate.dtype = Dtype::kBfloat16; }), "gate has another dtype"));
  CHECK(has(refused([](auto& a) { a.out.dtype = Dtype::kBfloat16; }), "out has another dtype"));
  CHECK(has(refused([](auto& a) { a.shape.width = -1; }), "is negative"));
  CHECK(refused([](auto& a) { a.shape.width = 0, a.hidden.data = nullptr; }).empty());
}

}  // namespace
}  // namespace vivace::test
