// Tokens selected, taken out of all and put back, against loops that say the same, on every instruction set: ids and
// bits, layouts, ties and NaN, and what must be refused.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "ops/norm_modulate.h"
#include "ops/scatter_tokens.h"
#include "ops/select_tokens.h"
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

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

template <typename T>
Buffer<T> drawn(Random& random, int64_t count, int64_t offset) {
  Buffer<T> made(count, offset);
  for (int64_t i = 0; i < count; ++i) set(made.data() + i, random.value());
  return made;
}

// Ascending ids of each picture.
std::vector<int32_t> some_ids(Random& random, int64_t pictures, int64_t count, int64_t tokens) {
  std::vector<int32_t> ids;
  for (int64_t p = 0; p < pictures; ++p) {
    std::vector<int32_t> all(static_cast<size_t>(tokens));
    std::iota(all.begin(), all.end(), 0);
    for (size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[static_cast<size_t>(random.below(i))]);
    std::sort(all.begin(), all.begin() + count);
    ids.insert(ids.end(), all.begin(), all.begin() + count);
  }
  return ids;
}

constexpr int64_t kRows = 4, kPictures = 2, kTokens = 9, kCount = 4;

template <typename T>
RowTensor tensor(Buffer<T>& memory, int64_t tokens, int64_t width) {
  return {memory.data(), kDtype<T>, tokens * width, width};
}

template <typename T>
void check_gather(int64_t width, bool normed) {
  Random random(static_cast<uint64_t>(width));
  const std::vector<int32_t> ids = some_ids(random, kPictures, kCount, kTokens);
  Buffer<T> x = drawn<T>(random, kRows * kTokens * width, 3), out(kRows * kCount * width, 1);
  Buffer<T> beside(normed ? out.size() : 0, 2), wanted(out.size(), 0), scale = drawn<T>(random, kRows * width, 0);
  const RowShape shape{kRows, kCount, width};
  const RowTensor vector{scale.data(), kDtype<T>, width, 0}, to = tensor(out, kCount, width);
  const RowTensor into = normed ? tensor(beside, kCount, width) : RowTensor{};
  gather_tokens({{ids.data(), kPictures, kTokens},
                 tensor(x, kTokens, width),
                 to,
                 normed ? vector : RowTensor{},
                 {},
                 {},
                 {},
                 into,
                 shape,
                 true,
                 1e-6},
                1);
  bool equal = true;
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t m = 0; m < kCount; ++m) {
      const int64_t from = (r * kTokens + ids[static_cast<size_t>(r % kPictures * kCount + m)]) * width;
      for (int64_t i = 0; i < width; ++i)
        equal = equal && same(get(out.data() + (r * kCount + m) * width + i), get(x.data() + from + i));
    }
  }
  CHECK_IN(equal, std::to_string(width));
  if (!normed) return;
  norm_modulate({to, vector, {}, {}, {}, tensor(wanted, kCount, width), shape, true, 1e-6}, 1);
  for (int64_t i = 0; i < wanted.size(); ++i) equal = equal && same(get(wanted.data() + i), get(beside.data() + i));
  CHECK_IN(equal, std::to_string(width) + " normalised");
}

VV_TEST(gathered_tokens_are_those_of_x_and_normalised_ones_have_the_bits_of_the_norm) {
  for (const int64_t width : {1, 7, 16, 31, 64, 97, 1152}) {
    for (const bool normed : {false, true}) {
      check_gather<float>(width, normed);
      check_gather<uint16_t>(width, normed);
    }
  }
}

struct ScatterKind {
  bool lanes, split, summed;
};

template <typename K, typename T>
void check_scatter(int64_t width, const ScatterKind& kind) {
  Random random(static_cast<uint64_t>(width) + 50);
  const std::vector<int32_t> ids = some_ids(random, kPictures, kCount, kTokens);
  Buffer<K> full = drawn<K>(random, (kRows + 1) * kTokens * width, 1);
  std::vector<K> wanted(full.data(), full.data() + full.size());
  Buffer<T> fresh = drawn<T>(random, kRows * kCount * width, 2), hidden = drawn<T>(random, fresh.size(), 0);
  Buffer<float> gate = drawn<float>(random, kRows * width, 1);
  const int64_t first = kind.split ? width / 3 : width;
  std::vector<void*> at;
  for (int64_t r = 0; r < kRows; ++r) at.push_back(full.data() + (kind.lanes ? kRows - r : r) * kTokens * width);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t m = 0; m < kCount; ++m) {
      const int64_t id = ids[static_cast<size_t>(r % kPictures * kCount + m)];
      for (int64_t i = 0; i < width; ++i) {
        const int64_t from = (r * kCount + m) * width + i;
        float value = get(fresh.data() + from);
        if (kind.summed) {
          const float step = gate.data()[r * width + i] * value;
          value = get(hidden.data() + from) + step;
        }
        set(wanted.data() + ((kind.lanes ? kRows - r : r) * kTokens + id) * width + i, value);
      }
    }
  }
  RowTensor source = tensor(fresh, kCount, width), second = source;
  second.data = fresh.data() + first;
  const RowTensor vector{gate.data(), Dtype::kFloat32, width, 0};
  scatter_tokens({{ids.data(), kPictures, kTokens},
                  tensor(full, kTokens, width),
                  kind.lanes ? at.data() : nullptr,
                  source,
                  kind.split ? second : RowTensor{},
                  first,
                  kind.summed ? tensor(hidden, kCount, width) : RowTensor{},
                  kind.summed ? vector : RowTensor{},
                  {kRows, kCount, width}},
                 2);
  bool equal = true;
  for (int64_t i = 0; i < full.size(); ++i)
    equal = equal && same(get(full.data() + i), get(wanted.data() + static_cast<size_t>(i)));
  CHECK_IN(equal, std::to_string(width) + (kind.lanes ? " lanes" : "") + (kind.split ? " split" : "") +
                      (kind.summed ? " summed" : ""));
}

VV_TEST(scattered_tokens_go_to_their_places_and_nothing_else_is_written) {
  for (const int64_t width : {1, 7, 16, 33, 97, 1152}) {
    for (const ScatterKind& kind : {ScatterKind{true, false, false}, ScatterKind{false, true, false},
                                    ScatterKind{true, true, false}, ScatterKind{true, false, true}}) {
      check_scatter<float, float>(width, kind);
      check_scatter<uint16_t, float>(width, kind);
      check_scatter<float, uint16_t>(width, kind);
      check_scatter<uint16_t, uint16_t>(width, kind);
    }
  }
}

// --- selection -------------------------------------------------------------------------------------------------------

struct Selection {
  std::vector<int64_t> grid, patch;
  int64_t channels, planes, keep, lowest, bound, least;
  TokenMetric metric;
  bool ties, nan;
};

// The order of the definition, sentence by sentence.
std::vector<int32_t> selected_by_hand(const std::vector<float>& scores, const std::vector<int32_t>& ages,
                                      const std::vector<float>& factors, const Selection& s) {
  const auto tokens = static_cast<int64_t>(scores.size());
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    if (std::isnan(scores[a]) != std::isnan(scores[b])) return std::isnan(scores[b]);
    return scores[a] < scores[b] || (!(scores[b] < scores[a]) && a < b);
  });
  std::vector<float> effective(scores.size());
  const auto last = static_cast<int32_t>(factors.size()) - 1;
  for (int64_t r = 0; r < tokens; ++r) {
    const auto distance = static_cast<float>(std::abs(2 * r - (2 * s.lowest + s.keep - 1)));
    effective[order[r]] = distance * factors[std::min(ages[order[r]], last)];
  }
  int64_t forced = 0;
  for (int64_t d = 1; d <= s.bound + 1; ++d) {
    const auto due = std::count_if(ages.begin(), ages.end(), [&](int32_t age) { return s.bound - age + 1 <= d; });
    forced = std::max<int64_t>(forced, due - s.least * (d - 1));
  }
  forced = std::min(forced, s.keep);
  const auto sooner = [&](int32_t a, int32_t b) {
    return effective[a] != effective[b] ? effective[a] < effective[b] : a < b;
  };
  std::sort(order.begin(), order.end(),
            [&](int32_t a, int32_t b) { return ages[a] != ages[b] ? ages[a] > ages[b] : sooner(a, b); });
  std::sort(order.begin() + forced, order.end(), sooner);
  std::vector<int32_t> ids(order.begin(), order.begin() + s.keep);
  std::sort(ids.begin(), ids.end());
  return ids;
}

float metric_by_hand(const std::vector<float>& v, TokenMetric metric) {
  float total = 0.0f;
  const auto add = [&](bool first, float term) { total = first ? term : total + term; };
  if (metric == TokenMetric::kNorm) {
    for (size_t c = 0; c < v.size(); ++c) add(c == 0, v[c] * v[c]);
    return std::sqrt(total);
  }
  if (v.size() == 1) return std::fabs(v[0]);
  for (size_t c = 0; c < v.size(); ++c) add(c == 0, v[c]);
  const float mean = total / static_cast<float>(v.size());
  for (size_t c = 0; c < v.size(); ++c) add(c == 0, (v[c] - mean) * (v[c] - mean));
  return std::sqrt(total / static_cast<float>(v.size() - 1));
}

// Scores of a sample of planes [channels, height, width] of two axes, or of one.
template <typename T>
std::vector<float> scores_by_hand(const std::vector<Buffer<T>>& planes, const float* weights, const Selection& s) {
  const bool line = s.grid.size() == 1;
  const int64_t rows = line ? 1 : s.grid[0], tall = line ? 1 : s.patch[0];
  const int64_t columns = s.grid.back(), wide = s.patch.back(), pixels = rows * tall * columns * wide;
  std::vector<float> scores;
  for (int64_t token = 0; token < rows * columns; ++token) {
    float total = 0.0f;
    for (int64_t k = 0; k < tall * wide; ++k) {
      const int64_t y = token / columns * tall + k / wide, x = token % columns * wide + k % wide;
      std::vector<float> v;
      for (int64_t c = 0; c < s.channels; ++c) {
        float value = 0.0f;
        for (int64_t j = 0; j < s.planes; ++j) {
          const float term = weights[j] * get(planes[j].data() + c * pixels + y * columns * wide + x);
          value = j == 0 ? term : value + term;
        }
        v.push_back(value);
      }
      const float pixel = metric_by_hand(v, s.metric);
      total = k == 0 ? pixel : total + pixel;
    }
    scores.push_back(total / static_cast<float>(tall * wide));
  }
  return scores;
}

template <typename T>
void check_selection(const Selection& s, uint64_t seed) {
  Random random(seed);
  const int64_t tokens = std::accumulate(s.grid.begin(), s.grid.end(), int64_t{1}, std::multiplies<>());
  const int64_t each = std::accumulate(s.patch.begin(), s.patch.end(), int64_t{1}, std::multiplies<>());
  std::vector<Buffer<T>> planes;
  std::vector<const void*> addresses;
  for (int64_t j = 0; j < s.planes; ++j) {
    planes.emplace_back(s.channels * tokens * each, j);
    for (int64_t i = 0; i < planes.back().size(); ++i) {
      const float value = static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-30f;
      set(planes.back().data() + i, s.nan && random.chance(5) ? NAN : s.ties ? std::round(value) : value);
    }
  }
  for (const Buffer<T>& plane : planes) addresses.push_back(plane.data());
  std::vector<float> weights, factors = {1.0f, 0.9f, 0.8f};
  for (int64_t j = 0; j < s.planes; ++j) weights.push_back(s.ties ? 1.0f : 0.7f + 0.3f * static_cast<float>(j));
  std::vector<int32_t> ages;
  for (int64_t p = 0; p < tokens; ++p) ages.push_back(random.below(s.bound + 2));
  const std::vector<int32_t> wanted = selected_by_hand(scores_by_hand(planes, weights.data(), s), ages, factors, s);
  std::vector<int32_t> ids(static_cast<size_t>(s.keep), -1), after = ages;
  const std::vector<int64_t> strides(static_cast<size_t>(s.planes), 0);
  SelectTokensArgs args{};
  args.planes = addresses.data(), args.plane_strides = strides.data(), args.plane_count = s.planes;
  args.dtype = kDtype<T>, args.weights = weights.data(), args.channels = s.channels;
  args.grid = s.grid.data(), args.patch = s.patch.data(), args.axes = static_cast<int64_t>(s.grid.size());
  args.metric = s.metric, args.ages = after.data(), args.ids = ids.data(), args.batch = 1, args.tokens = tokens;
  args.keep = s.keep, args.lowest = s.lowest, args.factors = factors.data(), args.factor_count = 3;
  args.bound = s.bound, args.least = s.least;
  select_tokens(args, 1);
  CHECK_IN(ids == wanted, std::to_string(seed));
  for (int64_t p = 0; p < tokens; ++p) {
    const bool now = std::find(wanted.begin(), wanted.end(), p) != wanted.end();
    CHECK_IN(after[static_cast<size_t>(p)] == (now ? 0 : ages[static_cast<size_t>(p)] + 1), std::to_string(seed));
  }
}

VV_TEST(selected_tokens_are_those_of_the_definition) {
  uint64_t seed = 0;
  for (const int64_t channels : {1, 2, 3, 16}) {
    for (const TokenMetric metric : {TokenMetric::kDeviation, TokenMetric::kNorm}) {
      for (const bool odd : {false, true}) {
        const Selection s{{4, 6}, {2, 3}, channels, 1 + channels % 4, 7, 5, 3, 6, metric, odd, odd};
        check_selection<float>(s, ++seed);
        check_selection<uint16_t>(s, ++seed);
      }
    }
  }
  for (const int64_t keep : {0, 1, 40, 96, 97}) {
    const Selection s{{97}, {1}, 4, 2, keep, (97 - keep) / 2, 4, keep, TokenMetric::kNorm, keep == 40, false};
    check_selection<float>(s, ++seed);
  }
}

VV_TEST(illegal_calls_of_the_ops_over_tokens_are_refused) {
  std::vector<float> x(64, 1.0f);
  std::vector<int32_t> ids = {0, 3, 1, 2}, ages(8, 0);
  const auto rows = [&](int64_t tokens) { return RowTensor{x.data(), Dtype::kFloat32, tokens * 2, 2}; };
  const auto gathers = [&](auto change) {
    GatherTokensArgs args{{ids.data(), 2, 4}, rows(4), rows(2), {}, {}, {}, {}, {}, {4, 2, 2}, true, 1e-6};
    change(args);
    return refusal([&] { check_gather_tokens(args); });
  };
  CHECK(gathers([](auto&) {}).empty());
  CHECK(has(gathers([](auto& a) { a.ids.tokens = 3; }), "id 3 is not one of 3 tokens"));
  CHECK(has(gathers([](auto& a) { a.ids.samples = 3; }), "ids of 3 samples for 4 rows"));
  CHECK(has(gathers([](auto& a) { a.ids.ids = nullptr; }), "ids has no memory"));
  CHECK(has(gathers([](auto& a) { a.x.data = nullptr; }), "x has no memory"));
  CHECK(has(gathers([](auto& a) { a.out.dtype = Dtype::kBfloat16; }), "out has another dtype"));
  const auto scatters = [&](auto change) {
    ScatterTokensArgs args{{ids.data(), 2, 4}, rows(4), nullptr, rows(2), {}, 0, {}, {}, {4, 2, 2}};
    change(args);
    return refusal([&] { check_scatter_tokens(args); });
  };
  CHECK(scatters([](auto&) {}).empty());
  CHECK(has(scatters([](auto& a) { a.full.data = nullptr; }), "full has no memory for row 0"));
  CHECK(has(scatters([](auto& a) { a.full.dtype = Dtype::kInt8; }), "neither float32 nor bfloat16"));
  CHECK(has(scatters([](auto& a) { a.gate = a.fresh; }), "gate without hidden"));
  CHECK(has(scatters([](auto& a) { a.second = a.hidden = a.fresh; }), "hidden beside second"));
  CHECK(has(scatters([](auto& a) { a.second = a.fresh, a.first = 3; }), "3 wide of 2"));
  const int64_t grid[] = {8}, patch[] = {1}, stride = 0;
  const void* plane = x.data();
  const auto selects = [&](auto change) {
    SelectTokensArgs args{&plane,     &stride,
                          1,          Dtype::kFloat32,
                          x.data(),   1,
                          grid,       patch,
                          1,          TokenMetric::kNorm,
                          nullptr,    ages.data(),
                          ids.data(), 1,
                          8,          4,
                          0,          nullptr,
                          0,          -1,
                          0};
    change(args);
    return refusal([&] { select_tokens(args, 1); });
  };
  CHECK(selects([](auto&) {}).empty());
  CHECK(has(selects([](auto& a) { a.keep = 9; }), "9 of 8 tokens"));
  CHECK(has(selects([](auto& a) { a.lowest = 5; }), "5 dropped from the bottom"));
  CHECK(has(selects([](auto& a) { a.bound = -2; }), "bound is -2"));
  CHECK(has(selects([](auto& a) { a.least = 5; }), "least 5"));
  CHECK(has(selects([](auto& a) { a.plane_count = 5; }), "5 planes"));
  CHECK(has(selects([](auto& a) { a.plane_count = 0; }), "scores has no memory"));
  CHECK(has(selects([](auto& a) { a.dtype = Dtype::kInt8; }), "no planes of dtype 3"));
  CHECK(has(selects([](auto& a) { a.axes = 0; }), "0 axes"));
  CHECK(has(selects([](auto& a) { a.tokens = 7, a.keep = 1; }), "a grid of 8 tokens"));
  CHECK(has(selects([](auto& a) { a.ages = nullptr; }), "ages or ids"));
  CHECK(has(selects([](auto& a) { a.factor_count = 2; }), "factors has no memory"));
}

}  // namespace
}  // namespace vivace::test
