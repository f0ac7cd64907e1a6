// Queries and keys against the definition, element by element, bit for bit: every width, norm, rotation and layout.
#include "ops/qk_norm_rope.h"

#include <cmath>
#include <string>
#include <vector>

#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

constexpr int64_t kBatch = 2, kTokens = 4, kHeads = 17;  // more heads than the kernel takes at a time
constexpr double kEps = 1e-6;

float get(const float* p) { return *p; }
float get(const uint16_t* p) { return widen(*p, Dtype::kBfloat16); }
void set(float* p, float x) { *p = x; }
void set(uint16_t* p, float x) { *p = static_cast<uint16_t>(bits(stored(x, Dtype::kBfloat16)) >> 16); }

template <typename T>
constexpr Dtype kDtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kBfloat16;

struct Options {
  HeadNormKind kind;
  bool across, turned, halves, heads_outermost;
};

// Sum of terms [heads][width]: element i in lane i mod 16, then a tree.
float tree(const std::vector<float>& terms, int64_t width) {
  float lanes[16] = {};
  for (size_t h = 0; h < terms.size(); h += static_cast<size_t>(width)) {
    for (int64_t i = 0; i < width; ++i) lanes[i % 16] = lanes[i % 16] + terms[h + static_cast<size_t>(i)];
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];
  }
  return lanes[0];
}

void normalise(std::vector<float>& x, int64_t width, HeadNormKind kind) {
  if (kind == HeadNormKind::kNone) return;
  const double part = 1.0 / static_cast<double>(x.size());
  float rest = 0.0f;
  double offset = 0.0;
  if (kind == HeadNormKind::kLayer) {
    const auto mean = static_cast<float>(tree(x, width) * part);
    for (float& v : x) v = v - mean;
    const double off = tree(x, width) * part;
    rest = static_cast<float>(off);
    offset = off * off;
  }
  std::vector<float> squares = x;
  for (float& v : squares) v = v * v;
  double variance = tree(squares, width) * part - offset;
  if (variance < 0.0) variance = 0.0;
  const auto gain = static_cast<float>(1.0 / std::sqrt(variance + kEps));
  for (float& v : x) v = (kind == HeadNormKind::kLayer ? v - rest : v) * gain;
}

// One side of a call, [batch, tokens, heads, width] or with heads outermost, and what it must become.
template <typename T>
struct Side {
  Side(int64_t width, const Options& options, Random& random)
      : width(width),
        options(options),
        x(kBatch * kTokens * kHeads * width, 3),
        out(x.size(), 1),
        weight(options.across ? kHeads * width : width, 1),
        bias(weight.size(), 0) {
    for (int64_t i = 0; i < x.size(); ++i) {
      const float tame = static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-30f;
      set(x.data() + i, random.below(2000) == 0 ? random.value() : 3.0f + tame);
    }
    for (int64_t i = 0; i < weight.size(); ++i) weight.data()[i] = random.value(), set(bias.data() + i, random.value());
  }

  HeadTensor heads(T* p) const {
    if (options.heads_outermost) return {p, kTokens * kHeads * width, width, kTokens * width};
    return {p, kTokens * kHeads * width, kHeads * width, width};
  }
  int64_t place(int64_t b, int64_t n, int64_t h) const {
    const HeadTensor at = heads(nullptr);
    return b * at.sample_stride + n * at.token_stride + h * at.head_stride;
  }
  QkSide side(bool turned) {
    QkSide made{heads(x.data()), heads(out.data()), {}, {}, kTokens, kHeads, turned};
    if (options.kind == HeadNormKind::kNone) return made;
    made.weight = {weight.data(), Dtype::kFloat32, weight.size()};
    made.bias = {bias.data(), kDtype<T>, bias.size()};
    return made;
  }

  // The heads of a token before rotation.
  std::vector<float> normal(int64_t b, int64_t n) const {
    std::vector<float> all;
    for (int64_t h = 0; h < kHeads; ++h) {
      std::vector<float> one;
      for (int64_t i = 0; i < width; ++i) one.push_back(get(x.data() + place(b, n, h) + i));
      if (!options.across) normalise(one, width, options.kind);
      all.insert(all.end(), one.begin(), one.end());
    }
    if (options.across) normalise(all, width, options.kind);
    for (size_t i = 0; i < all.size() && options.kind != HeadNormKind::kNone; ++i) {
      const auto at = static_cast<int64_t>(i) % weight.size();
      all[i] = all[i] * weight.data()[at] + get(bias.data() + at);
    }
    return all;
  }

  // Whether the result is right; cos and sin are the rows of the turned tokens, from token 1 on.
  bool right(const std::vector<float>& cos, const std::vector<float>& sin, bool turned) const {
    for (int64_t row = 0; row < kBatch * kTokens; ++row) {
      const int64_t b = row / kTokens, n = row % kTokens;
      const std::vector<float> y = normal(b, n);
      for (int64_t j = 0; j < kHeads * width; ++j) {
        const int64_t h = j / width, i = j % width, half = width / 2;
        float want = y[static_cast<size_t>(j)];
        if (turned && n >= 1 && n < kTokens - 1) {
          const auto at = static_cast<size_t>((n - 1) * width + i);
          const bool first = options.halves ? i < half : i % 2 == 0;
          const int64_t step = options.halves ? half : 1;
          const float other = y[static_cast<size_t>(first ? j + step : j - step)];
          want = want * cos[at] + (first ? -other : other) * sin[at];
        }
        const float got = get(out.data() + place(b, n, h) + i);
        if (!same(got, stored(want, kDtype<T>))) return false;
      }
    }
    return true;
  }

  int64_t width;
  Options options;
  Buffer<T> x, out;
  Buffer<float> weight;
  Buffer<T> bias;
};

template <typename T>
struct Problem {
  Problem(int64_t width, const Options& options, uint64_t seed)
      : random(seed + static_cast<uint64_t>(width)), query(width, options, random), key(width, options, random) {
    for (int64_t i = 0; i < (kTokens - 2) * width; ++i) cos.push_back(random.value()), sin.push_back(random.value());
  }
  QkNormRopeArgs args() {
    const Options& o = query.options;
    const TurnTable tables[] = {{cos.data(), 0, query.width}, {sin.data(), 0, query.width}};
    return {{query.side(o.turned), key.side(false)},
            kBatch,
            query.width,
            kDtype<T>,
            o.kind,
            kEps,
            tables[0],
            tables[1],
            1,
            kTokens - 2,
            o.halves};
  }
  bool right() const { return query.right(cos, sin, query.options.turned) && key.right(cos, sin, false); }

  Random random;
  Side<T> query, key;
  std::vector<float> cos, sin;
};

template <typename T>
void check_all(const char* name) {
  for (const int64_t width : {1, 2, 15, 16, 24, 34, 64, 72, 128}) {
    for (const HeadNormKind kind : {HeadNormKind::kNone, HeadNormKind::kRms, HeadNormKind::kLayer}) {
      for (int bits = 0; bits < 8; ++bits) {
        const Options options{kind, (bits & 1) != 0, width % 2 == 0, (bits & 2) != 0, (bits & 4) != 0};
        Problem<T> one(width, options, 7);
        qk_norm_rope(one.args(), 1);
        CHECK_IN(one.right(), std::string(name) + std::to_string(width) + " " + std::to_string(bits));
        Problem<T> there(width, options, 7);
        QkNormRopeArgs in_place = there.args();
        for (QkSide& side : in_place.side) side.out = side.x;
        qk_norm_rope(in_place, 1);
        bool equal = true;
        for (int64_t i = 0; i < one.query.x.size(); ++i)
          equal = equal && same(get(there.query.x.data() + i), get(one.query.out.data() + i));
        CHECK_IN(equal, std::string(name) + std::to_string(width) + " in place");
      }
    }
  }
}

VV_TEST(heads_of_float32_have_the_bits_of_the_definition) { check_all<float>("float32 "); }
VV_TEST(heads_of_bfloat16_have_the_bits_of_the_definition) { check_all<uint16_t>("bfloat16 "); }

VV_TEST(illegal_calls_over_heads_are_refused) {
  Problem<float> one(16, {HeadNormKind::kRms, false, true, false, false}, 1);
  const auto refused = [&](auto change) {
    QkNormRopeArgs args = one.args();
    change(args);
    return refusal([&] { qk_norm_rope(args, 1); });
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(refused([](auto&) {}).empty());
  CHECK(has(refused([](auto& a) { a.side[0].x.data = nullptr; }), "query has no memory"));
  CHECK(has(refused([](auto& a) { a.side[1].out.data = nullptr; }), "key has no memory"));
  CHECK(has(refused([](auto& a) { a.side[1].tokens = -1; }), "key has a negative size"));
  CHECK(has(refused([](auto& a) { a.side[1].tokens = int64_t{1} << 60; }), "key fits no memory"));
  CHECK(has(refused([](auto& a) { a.width = -1; }), "a size is negative"));
  CHECK(has(refused([](auto& a) { a.width = 15; }), "a vector of query has 16 elements"));
  CHECK(has(refused([](auto& a) { a.side[1].bias.size = 17 * 16; }), "have 16 and 272 elements"));
  CHECK(has(refused([](auto& a) { a.side[1].bias.dtype = Dtype::kFloat16; }), "is of dtype 2"));
  CHECK(has(refused([](auto& a) { a.dtype = Dtype::kFloat16; }), "no elements of dtype 2"));
  CHECK(has(refused([](auto& a) { a.eps = NAN; }), "eps is nan"));
  CHECK(has(refused([](auto& a) { a.first_row = 3; }), "tokens 3 to 5 of query are turned, it has 4"));
  CHECK(has(refused([](auto& a) { a.first_row = -1; }), "tokens -1 to 1"));
  CHECK(has(refused([](auto& a) { a.rows = -1; }), "are turned"));
  CHECK(has(refused([](auto& a) { a.sin.data = nullptr; }), "cos or sin has no memory"));
  CHECK(has(refused([](auto& a) {
              a.width = 1;
              for (QkSide& side : a.side) side.weight.size = side.bias.size = 1;
            }),
            "cannot be turned in pairs"));
  CHECK(refused([](auto& a) { a.batch = 0, a.side[0].x.data = nullptr; }).empty());
}

}  // namespace
}  // namespace vivace::test
