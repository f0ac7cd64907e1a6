// Kept planes against their definition, element by element: every store, width and dtype of the rows, with and without
// base, hidden states and gate; then read again.
#include <cmath>
#include <string>
#include <vector>

#include "ops/cache_apply.h"
#include "ops/cache_update.h"
#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

constexpr int64_t kBatch = 2, kTokens = 3, kPlanes = 4;
constexpr int64_t kWidths[] = {1, 7, 15, 16, 17, 33, 64, 123, 200};
constexpr Dtype kStores[] = {Dtype::kFloat32, Dtype::kBfloat16, Dtype::kFloat16, Dtype::kInt8, Dtype::kFloat8};

float float8_value(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const float size = std::ldexp(static_cast<float>(fraction + (exponent ? 8 : 0)), (exponent ? exponent : 1) - 10);
  return std::copysign((code & 127) == 127 ? NAN : size, code >> 7 ? -1.0f : 1.0f);
}

// x as a store of floats holds it.
float kept_as(float x, Dtype dtype) {
  if (dtype != Dtype::kFloat8 || x != x) return stored(x, dtype);
  return rounded(std::fmin(std::fmax(x, -448.0f), 448.0f), 4, -6, 8);
}

// Planes of a row, ending where their memory ends.
struct Kept {
  Kept(int64_t width, Dtype dtype)
      : width(width),
        dtype(dtype),
        bytes(kPlanes * kTokens * width * dtype_size(dtype), 0),
        scales(kPlanes * kTokens, 1) {}

  void fill(Random& random) {
    for (int64_t i = 0; i < bytes.size(); ++i) bytes.data()[i] = static_cast<uint8_t>(random.word());
    if (dtype == Dtype::kFloat32) {
      for (int64_t i = 0; i < bytes.size(); i += 4) {
        const float x = random.value();
        std::memcpy(bytes.data() + i, &x, 4);
      }
    }
    for (int64_t i = 0; i < scales.size(); ++i) scales.data()[i] = static_cast<float>(random.word()) * 0x1p-36f;
  }

  float at(int64_t plane, int64_t token, int64_t i) const {
    const int64_t row = plane * kTokens + token, place = row * width + i;
    const uint8_t* element = bytes.data() + place * dtype_size(dtype);
    if (dtype == Dtype::kInt8) return static_cast<float>(static_cast<int8_t>(*element)) * scales.data()[row];
    if (dtype == Dtype::kFloat8) return float8_value(*element);
    uint32_t word = 0;
    std::memcpy(&word, element, static_cast<size_t>(dtype_size(dtype)));
    return dtype == Dtype::kFloat32 ? from_bits(word) : widen(static_cast<uint16_t>(word), dtype);
  }

  KeptRow row() { return {bytes.data(), dtype == Dtype::kInt8 ? scales.data() : nullptr}; }

  int64_t width;
  Dtype dtype;
  Buffer<uint8_t> bytes;
  Buffer<float> scales;
};

// A row as the store holds it, and the scale it has there.
std::vector<float> kept_row(const std::vector<float>& x, Dtype dtype, float& scale) {
  std::vector<float> y;
  if (dtype != Dtype::kInt8) {
    for (const float v : x) y.push_back(kept_as(v, dtype));
    return y;
  }
  float most = 0.0f;
  bool finite = true;
  for (const float v : x) most = std::fmax(most, std::fabs(v)), finite = finite && std::isfinite(v);
  scale = finite ? most / 127.0f : NAN;
  if (scale == 0.0f) scale = 1.0f;
  for (const float v : x) {
    const float whole = finite ? std::fmin(std::fmax(std::nearbyint(v / scale), -127.0f), 127.0f) : 0.0f;
    y.push_back((whole == 0.0f ? 0.0f : whole) * scale);
  }
  return y;
}

// Rows [batch, tokens, width] with a gap, as floats and as they are stored.
struct Rows {
  Rows(int64_t width, Dtype dtype) : stride(width + 3), dtype(dtype) {
    wide.resize(static_cast<size_t>(kBatch * kTokens * stride - 3));
  }

  void fill(Random& random) {
    for (float& x : wide) {
      const float tame = static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-30f;
      x = stored(random.below(300) == 0 ? random.value() : tame, dtype);
    }
    halves.clear();
    for (const float x : wide) halves.push_back(static_cast<uint16_t>(bits(x) >> 16));
  }

  RowTensor rows() {
    void* data = dtype == Dtype::kFloat32 ? static_cast<void*>(wide.data()) : halves.data();
    return {data, dtype, kTokens * stride, stride};
  }
  RowTensor by_sample() { return {rows().data, dtype, stride, 0}; }

  size_t place(int64_t b, int64_t n, int64_t i) const { return static_cast<size_t>((b * kTokens + n) * stride + i); }
  float at(int64_t b, int64_t n, int64_t i) const { return wide[place(b, n, i)]; }
  float gate_at(int64_t b, int64_t i) const { return wide[static_cast<size_t>(b * stride + i)]; }
  // What a kernel wrote.
  float found(int64_t b, int64_t n, int64_t i) const {
    return dtype == Dtype::kFloat32 ? wide[place(b, n, i)] : widen(halves[place(b, n, i)], dtype);
  }

  int64_t stride;
  Dtype dtype;
  std::vector<float> wide;
  std::vector<uint16_t> halves;
};

struct Problem {
  Problem(int64_t width, Dtype store, Dtype fresh_dtype, Dtype hidden_dtype, uint64_t seed)
      : width(width),
        kept{{width, store}, {width, store}},
        fresh(width, fresh_dtype),
        base(width, fresh_dtype),
        hidden(width, hidden_dtype),
        gate(width, hidden_dtype),
        out(width, hidden_dtype) {
    Random random(seed);
    for (Kept& one : kept) one.fill(random), table.push_back(one.row());
    for (Rows* rows : {&fresh, &base, &hidden, &gate, &out}) rows->fill(random);
    for (float& w : weights) w = static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-30f;
  }

  KeptRows rows() const { return {table.data(), kept[0].dtype}; }

  CacheUpdateArgs update(int64_t made, bool based, bool added, bool gated) {
    return {fresh.rows(),
            based ? base.rows() : RowTensor{},
            rows(),
            made,
            added ? hidden.rows() : RowTensor{},
            gated ? gate.by_sample() : RowTensor{},
            out.rows(),
            {kBatch, kTokens, width}};
  }

  CacheApplyArgs apply(int64_t terms, bool added, bool gated) {
    return {rows(),
            weights,
            terms,
            added ? hidden.rows() : RowTensor{},
            gated ? gate.by_sample() : RowTensor{},
            out.rows(),
            {kBatch, kTokens, width}};
  }

  float sum(int64_t b, int64_t n, int64_t i, float step, bool gated) const {
    return hidden.at(b, n, i) + (gated ? gate.gate_at(b, i) * step : step);
  }

  bool found(int64_t b, int64_t n, int64_t i, float y) const { return same(out.found(b, n, i), stored(y, out.dtype)); }

  // Whether planes and sum are those of the definition, `before` being what was kept.
  bool updated(const std::vector<Kept>& before, int64_t made, bool based, bool added, bool gated) const {
    bool equal = true;
    for (int64_t b = 0; b < kBatch; ++b) {
      for (int64_t n = 0; n < kTokens; ++n) {
        std::vector<float> next;
        for (int64_t i = 0; i < width; ++i) {
          next.push_back(based ? fresh.at(b, n, i) - base.at(b, n, i) : fresh.at(b, n, i));
          equal = equal && (!added || found(b, n, i, sum(b, n, i, next.back(), gated)));
        }
        for (int64_t j = 0; j < kPlanes; ++j) {
          const Kept& old = before[static_cast<size_t>(b)];
          float scale = kept[b].scales.data()[j * kTokens + n];
          const float there = scale;
          const std::vector<float> row = kept_row(next, old.dtype, scale);
          equal = equal && same(there, j <= made ? scale : old.scales.data()[j * kTokens + n]);
          for (int64_t i = 0; i < width; ++i) {
            const float was = old.at(j, n, i), is = row[static_cast<size_t>(i)];
            equal = equal && same(kept[b].at(j, n, i), j <= made ? is : was);
            next[static_cast<size_t>(i)] -= was;
          }
        }
      }
    }
    return equal;
  }

  bool applied(int64_t terms, bool added, bool gated) const {
    bool equal = true;
    for (int64_t b = 0; b < kBatch; ++b) {
      for (int64_t n = 0; n < kTokens; ++n) {
        for (int64_t i = 0; i < width; ++i) {
          float v = weights[b * terms] * kept[b].at(0, n, i);
          for (int64_t j = 1; j < terms; ++j) v = v + weights[b * terms + j] * kept[b].at(j, n, i);
          equal = equal && found(b, n, i, added ? sum(b, n, i, v, gated) : v);
        }
      }
    }
    return equal;
  }

  int64_t width;
  Kept kept[kBatch];
  std::vector<KeptRow> table;
  Rows fresh, base, hidden, gate, out;
  float weights[kBatch * kPlanes];
};

VV_TEST(planes_and_sums_have_the_bits_of_the_definition) {
  const Dtype pairs[][2] = {{Dtype::kFloat32, Dtype::kFloat32},
                            {Dtype::kBfloat16, Dtype::kBfloat16},
                            {Dtype::kFloat32, Dtype::kBfloat16},
                            {Dtype::kBfloat16, Dtype::kFloat32}};
  uint64_t seed = 0;
  for (const int64_t width : kWidths) {
    for (const Dtype store : kStores) {
      for (const auto& [fresh, hidden] : pairs) {
        for (int kind = 0; kind < 12; ++kind) {
          const bool based = kind & 1, added = kind & 2, gated = added && kind & 4;
          const int64_t made = kind / 4;
          Problem one(width, store, fresh, hidden, ++seed);
          const std::vector<Kept> before(one.kept, one.kept + kBatch);
          cache_update(one.update(made, based, added, gated), 1);
          const std::string where = std::to_string(width) + ", store " + std::to_string(static_cast<int>(store)) +
                                    ", kind " + std::to_string(kind);
          CHECK_IN(one.updated(before, made, based, added, gated), where);
          cache_apply(one.apply(made + 1, added, gated), 1);
          CHECK_IN(one.applied(made + 1, added, gated), where);
        }
      }
    }
  }
}

VV_TEST(every_float8_is_read_and_numbers_next_to_it_are_rounded_as_defined) {
  constexpr int64_t kCodes = 256;
  Kept kept(kCodes, Dtype::kFloat8);
  for (int64_t i = 0; i < kCodes; ++i) kept.bytes.data()[i] = static_cast<uint8_t>(i);
  const KeptRow row = kept.row();
  const float one = 1.0f;
  Buffer<float> out(kCodes, 1), fresh(kCodes, 1);
  const RowTensor to{out.data(), Dtype::kFloat32, 0, kCodes}, from{fresh.data(), Dtype::kFloat32, 0, kCodes};
  cache_apply({{&row, Dtype::kFloat8}, &one, 1, {}, {}, to, {1, 1, kCodes}}, 1);
  for (int64_t i = 0; i < kCodes; ++i) CHECK(same(out.data()[i], float8_value(static_cast<uint8_t>(i))));
  for (int round = 0; round < 400; ++round) {
    Random random(static_cast<uint64_t>(round));
    for (int64_t i = 0; i < kCodes; ++i) {
      const float tie = (float8_value(static_cast<uint8_t>(i)) + float8_value(static_cast<uint8_t>(i ^ 1))) / 2.0f;
      float x =
          round < 3 ? tie : std::ldexp(static_cast<float>(static_cast<int32_t>(random.word())), random.below(24) - 42);
      if (round == 1) x = std::nextafter(tie, 0.0f);
      if (round == 2) x = std::nextafter(tie, INFINITY);
      fresh.data()[i] = x;
    }
    cache_update({from, {}, {&row, Dtype::kFloat8}, 0, {}, {}, {}, {1, 1, kCodes}}, 1);
    bool equal = true;
    for (int64_t i = 0; i < kCodes; ++i)
      equal = equal && same(kept.at(0, 0, i), kept_as(fresh.data()[i], Dtype::kFloat8));
    CHECK(equal);
  }
}

VV_TEST(planes_do_not_depend_on_the_threads) {
  constexpr int64_t kMany = 3000, kWidth = 401;
  Random random(5);
  std::vector<float> fresh(kMany * kWidth);
  for (float& x : fresh) x = random.value();
  const RowTensor from{fresh.data(), Dtype::kFloat32, 0, kWidth};
  std::vector<int8_t> first(2 * fresh.size()), second(2 * fresh.size());
  std::vector<float> scales(2 * kMany, 1.0f), again(2 * kMany, 1.0f);
  const KeptRow one{first.data(), scales.data()}, other{second.data(), again.data()};
  cache_update({from, {}, {&one, Dtype::kInt8}, 1, {}, {}, {}, {1, kMany, kWidth}}, 1);
  cache_update({from, {}, {&other, Dtype::kInt8}, 1, {}, {}, {}, {1, kMany, kWidth}}, 4);
  bool equal = first == second;
  for (size_t i = 0; i < scales.size(); ++i) equal = equal && same(scales[i], again[i]);
  CHECK(equal);
}

VV_TEST(illegal_calls_over_planes_are_refused) {
  Problem one(16, Dtype::kInt8, Dtype::kFloat32, Dtype::kBfloat16, 1);
  const auto updated = [&](auto change) {
    CacheUpdateArgs args = one.update(1, true, true, true);
    change(args);
    return refusal([&] { cache_update(args, 1); });
  };
  const auto applied = [&](auto change) {
    CacheApplyArgs args = one.apply(2, true, true);
    change(args);
    return refusal([&] { cache_apply(args, 1); });
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  const std::vector<KeptRow> bare{{one.table[0].values, nullptr}, one.table[1]}, none{one.table[0], {}};
  CHECK(updated([](auto&) {}).empty() && applied([](auto&) {}).empty());
  CHECK(has(updated([](auto& a) { a.fresh.data = nullptr; }), "fresh has no memory"));
  CHECK(has(updated([](auto& a) { a.base.dtype = Dtype::kBfloat16; }), "base has another dtype"));
  CHECK(has(updated([](auto& a) { a.made = -1; }), "-1 differences"));
  CHECK(has(updated([](auto& a) { a.kept.rows = nullptr; }), "kept has no memory"));
  CHECK(has(updated([](auto& a) { a.kept.dtype = Dtype{7}; }), "nothing is kept"));
  CHECK(has(updated([&](auto& a) { a.kept.rows = bare.data(); }), "int8 row 0 has no scales"));
  CHECK(has(updated([&](auto& a) { a.kept.rows = none.data(); }), "kept row 1 has no memory"));
  CHECK(has(updated([](auto& a) { a.out.data = nullptr; }), "out has no memory"));
  CHECK(has(updated([](auto& a) { a.out.dtype = Dtype::kFloat32; }), "out has another dtype"));
  CHECK(has(updated([](auto& a) { a.gate.dtype = Dtype::kFloat16; }), "gate has another dtype"));
  CHECK(has(updated([](auto& a) { a.shape.tokens = -1; }), "is negative"));
  CHECK(updated([](auto& a) { a.shape.batch = 0, a.fresh.data = nullptr; }).empty());
  CHECK(has(applied([](auto& a) { a.terms = 0; }), "0 planes"));
  CHECK(has(applied([](auto& a) { a.weights = nullptr; }), "weights has no memory"));
  CHECK(has(applied([](auto& a) { a.out.dtype = Dtype::kInt8; }), "neither float32"));
  CHECK(has(applied([](auto& a) { a.hidden.dtype = Dtype::kFloat32; }), "out has another dtype"));
  CHECK(applied([](auto& a) { a.shape.tokens = 0, a.out.data = nullptr; }).empty());
}

}  // namespace
}  // namespace vivace::test
