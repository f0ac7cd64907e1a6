// Attention against its definition, row by row and bit for bit on every instruction set: widths, counts, layouts,
// blocks of keys, tasks in any order, NaN and infinities, and what must be refused.
#include "ops/attention.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float get(const float* p) { return *p; }
float get(const uint16_t* p) { return widen(*p, Dtype::kBfloat16); }
void set(float* p, float x) { *p = x; }
void set(uint16_t* p, float x) { *p = static_cast<uint16_t>(bits(stored(x, Dtype::kBfloat16)) >> 16); }

template <typename T>
constexpr Dtype kDtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kBfloat16;

struct Sizes {
  int64_t batch, heads, queries, keys, width;
};

std::string text(const Sizes& s) {
  return std::to_string(s.batch) + "x" + std::to_string(s.heads) + ", " + std::to_string(s.queries) + " queries, " +
         std::to_string(s.keys) + " keys, width " + std::to_string(s.width);
}

// 2^t, t <= 0: the polynomial of the kernel.
float weight(float t, Dtype dtype) {
  static const float wide[] = {0x1.5bda40p-10f, 0x1.3ce8acp-7f, 0x1.c6b6d8p-5f, 0x1.ebf9c2p-3f, 0x1.62e42ap-1f, 1.0f};
  static const float narrow[] = {0x1.c2a250p-5f, 0x1.f00c4cp-3f, 0x1.62f5fap-1f, 1.0f};
  const float near = t < -127.0f ? -127.0f : t, whole = std::nearbyint(near), rest = near - whole;
  const float y = dtype == Dtype::kFloat32 ? horner(rest, wide, 6) : horner(rest, narrow, 4);
  return y * from_bits(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
}

// A call on random heads, [batch, tokens, heads, width] with gaps or with heads outermost, that end where their memory
// ends.
template <typename T>
struct Problem {
  Problem(const Sizes& sizes, bool outermost, uint64_t seed)
      : sizes(sizes),
        outermost(outermost),
        query(room(sizes.queries), 3),
        key(room(sizes.keys), 1),
        value(room(sizes.keys), 0),
        out(room(sizes.queries), 1) {
    Random random(seed);
    for (Buffer<T>* one : {&query, &key, &value, &out}) {
      for (int64_t i = 0; i < one->size(); ++i)
        set(one->data() + i, static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-30f);
    }
  }

  int64_t gap() const { return outermost ? 0 : 3; }
  int64_t room(int64_t tokens) const {
    const int64_t all = sizes.batch * tokens * sizes.heads;
    return all == 0 || sizes.width == 0 ? 0 : all * (sizes.width + gap()) - gap();
  }
  HeadTensor heads(Buffer<T>& memory, int64_t tokens) const {
    const int64_t head = sizes.width + gap(), sample = tokens * sizes.heads * head;
    return outermost ? HeadTensor{memory.data(), sample, head, tokens * head}
                     : HeadTensor{memory.data(), sample, sizes.heads * head, head};
  }
  AttentionArgs args() {
    return {heads(query, sizes.queries),
            heads(key, sizes.keys),
            heads(value, sizes.keys),
            heads(out, sizes.queries),
            kDtype<T>,
            sizes.batch,
            sizes.heads,
            sizes.queries,
            sizes.keys,
            sizes.width,
            0.25f};
  }

  Sizes sizes;
  bool outermost;
  Buffer<T> query, key, value, out;
};

template <typename T>
float element(const HeadTensor& x, int64_t b, int64_t n, int64_t h, int64_t i) {
  return get(static_cast<const T*>(x.data) + b * x.sample_stride + n * x.token_stride + h * x.head_stride + i);
}

// sum + a(0) b(0) + a(1) b(1) + ...; of a pair the second first.
template <typename Term>
float chain(int64_t count, bool pairs, const Term& term) {
  float sum = 0.0f;
  for (int64_t k = 0; k < count + count % 2; ++k) {
    const int64_t at = pairs ? k ^ 1 : k;
    if (at < count) sum = term(at, sum);
  }
  return sum;
}

// One row of the result, in the order of the kernel.
template <typename T>
std::vector<float> defined(const AttentionArgs& a, int64_t b, int64_t n, int64_t h) {
  const bool pairs = sizeof(T) == 2;
  const int64_t block = attention_blocks(a).keys;
  const float scale = a.scale * 0x1.715476p+0f;
  float largest = -std::numeric_limits<float>::max(), total = 0.0f;
  std::vector<float> out(static_cast<size_t>(a.width), 0.0f);
  for (int64_t first = 0; first < a.keys; first += block) {
    const int64_t count = std::min(block, a.keys - first), padded = (count + 31) / 32 * 32;
    std::vector<float> p(static_cast<size_t>(padded), -kInfinity);
    float top = -std::numeric_limits<float>::max();
    for (int64_t j = 0; j < count; ++j) {
      p[j] = chain(a.width, pairs, [&](int64_t k, float sum) {
        return std::fmaf(element<T>(a.query, b, n, h, k), element<T>(a.key, b, first + j, h, k), sum);
      });
      top = std::max(top, p[j]);
    }
    const float factor = top * scale > largest ? weight(largest - top * scale, Dtype::kFloat32) : 1.0f;
    largest = std::max(largest, top * scale);
    float lanes[32] = {};
    for (int64_t j = 0; j < padded; ++j) {
      const float y = weight(p[j] * scale - largest, kDtype<T>);
      lanes[j % 32] = lanes[j % 32] + y;
      p[j] = stored(y, kDtype<T>);
    }
    for (int half = 16; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];
    }
    total = total * factor + lanes[0];
    // The pairs of the second product: keys i and i + 16 of 32.
    std::vector<int64_t> order;
    for (int64_t j = 0; j < padded; ++j) order.push_back(pairs ? j / 32 * 32 + j % 32 / 2 + j % 2 * 16 : j);
    for (int64_t i = 0; i < a.width; ++i) {
      const float sum = chain(padded, pairs, [&](int64_t step, float so_far) {
        const int64_t j = order[static_cast<size_t>(step)];
        return j < count ? std::fmaf(p[j], element<T>(a.value, b, first + j, h, i), so_far) : so_far;
      });
      out[i] = first == 0 ? sum : out[i] * factor + sum;
    }
  }
  const float share = 1.0f / total;
  for (float& x : out) x = a.keys == 0 ? 0.0f : stored(x * share, kDtype<T>);
  return out;
}

// Every row is the definition's, what lies between the heads is left alone.
template <typename T>
void check_bits(const Sizes& sizes, bool outermost, uint64_t seed) {
  Problem<T> problem(sizes, outermost, seed);
  const AttentionArgs a = problem.args();
  std::vector<T> wanted(problem.out.data(), problem.out.data() + problem.out.size());
  const T* start = problem.out.data();
  for (int64_t b = 0; b < sizes.batch; ++b) {
    for (int64_t n = 0; n < sizes.queries; ++n) {
      for (int64_t h = 0; h < sizes.heads; ++h) {
        const std::vector<float> row = defined<T>(a, b, n, h);
        const int64_t at = b * a.out.sample_stride + n * a.out.token_stride + h * a.out.head_stride;
        for (int64_t i = 0; i < sizes.width; ++i) set(wanted.data() + at + i, row[static_cast<size_t>(i)]);
      }
    }
  }
  attention(a, 2);
  bool equal = true;
  for (size_t i = 0; i < wanted.size(); ++i) equal = equal && same(get(start + i), get(wanted.data() + i));
  CHECK_IN(equal, text(sizes));
}

void check_both(const Sizes& sizes, uint64_t seed) {
  check_bits<float>(sizes, seed % 2 == 0, seed);
  check_bits<uint16_t>(sizes, seed % 2 == 1, seed);
}

VV_TEST(attention_has_the_bits_of_the_definition_at_every_width) {
  uint64_t seed = 0;
  for (const int64_t width : {1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 72, 80, 96, 112, 128, 130})
    check_both({2, 2, 7, 37, width}, ++seed);
}

VV_TEST(attention_has_the_bits_of_the_definition_for_all_counts) {
  uint64_t seed = 100;
  for (const int64_t keys : {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 77, 95, 96, 128, 130, 144})
    check_both({1, 2, 3, keys, 24}, ++seed);
  for (const int64_t queries : {1, 2, 5, 6, 11, 23, 24, 25, 48, 49}) check_both({1, 1, queries, 20, 40}, ++seed);
  check_both({1, 1, 300, 20, 16}, ++seed);  // several tasks
}

VV_TEST(attention_has_the_bits_of_the_definition_over_blocks_of_keys) {
  CHECK(attention_blocks(Problem<float>({1, 1, 1, 600, 128}, false, 0).args()).keys == 256);
  check_both({1, 1, 26, 600, 128}, 200);
  check_both({1, 2, 3, 257, 128}, 201);
  check_both({1, 1, 2, 161, 700}, 202);
  check_both({1, 1, 260, 100, 600}, 203);
}

VV_TEST(attention_without_keys_is_zero_and_without_queries_nothing) {
  check_both({2, 2, 3, 0, 24}, 300);
  check_both({2, 2, 0, 5, 24}, 301);
  check_both({0, 2, 3, 5, 24}, 302);
  check_both({2, 0, 3, 5, 24}, 303);
  check_both({2, 2, 3, 5, 0}, 304);
}

template <typename T>
void check_tasks(const Sizes& sizes) {
  Problem<T> all(sizes, false, 7), piecewise(sizes, false, 7);
  attention(all.args(), 1);
  const AttentionArgs args = piecewise.args();
  for (int64_t task = attention_tasks(args); task-- > 0;) {
    for (const int64_t offset : {0, 1}) {  // twice; scratch of the size asked for, at any place, with anything in it
      Buffer<float> scratch(attention_scratch(args), offset, from_bits(0x7fc00001u));
      attention_task(args, task, scratch.data());
    }
  }
  bool equal = true;
  for (int64_t i = 0; i < all.out.size(); ++i)
    equal = equal && same(get(all.out.data() + i), get(piecewise.out.data() + i));
  CHECK_IN(equal, text(sizes));
}

VV_TEST(tasks_of_attention_run_in_any_order_in_the_scratch_they_ask_for) {
  for (const Sizes& sizes : {Sizes{2, 3, 50, 77, 72}, Sizes{1, 1, 500, 33, 8}, Sizes{1, 2, 30, 600, 128}}) {
    check_tasks<float>(sizes);
    check_tasks<uint16_t>(sizes);
  }
}

VV_TEST(attention_does_not_depend_on_the_threads) {
  for (const int64_t keys : {500, 513}) {
    const Sizes sizes{1, 7, 60, keys, 64};
    Problem<float> one(sizes, true, 4), many(sizes, true, 4);
    attention(one.args(), 1);
    attention(many.args(), 4);
    CHECK(std::equal(one.out.data(), one.out.data() + one.out.size(), many.out.data()));
  }
}

VV_TEST(attention_may_write_over_its_queries) {
  const Sizes sizes{2, 2, 50, 300, 128};
  Problem<uint16_t> apart(sizes, false, 5), there(sizes, false, 5);
  attention(apart.args(), 1);
  AttentionArgs args = there.args();
  args.out = args.query;
  attention(args, 1);
  const AttentionArgs a = apart.args();
  for (int64_t n = 0; n < sizes.queries; ++n)
    CHECK(element<uint16_t>(a.out, 1, n, 1, 7) == element<uint16_t>(args.out, 1, n, 1, 7));
}

template <typename T>
void check_apart(int64_t keys) {
  const Sizes sizes{3, 2, 5, keys, 40};
  Problem<T> together(sizes, false, 9), apart(sizes, false, 9);
  AttentionArgs args = apart.args();
  const auto part = [](const HeadTensor& x, int64_t b) { return static_cast<T*>(x.data) + b * x.sample_stride; };
  const void* key_at[] = {part(args.key, 2), part(args.key, 0), part(args.key, 2)};
  const void* value_at[] = {part(args.value, 2), part(args.value, 0), part(args.value, 2)};
  args.key_at = key_at, args.value_at = value_at;
  args.key.data = args.value.data = nullptr;
  attention(args, 1);
  const AttentionArgs all = together.args();
  for (const int64_t b : {0, 1, 2}) {
    AttentionArgs one = all;
    one.batch = 1;
    one.query.data = part(all.query, b), one.out.data = part(all.out, b);
    one.key.data = part(all.key, b == 1 ? 0 : 2), one.value.data = part(all.value, b == 1 ? 0 : 2);
    attention(one, 1);
  }
  bool equal = true;
  for (int64_t i = 0; i < apart.out.size(); ++i)
    equal = equal && same(get(apart.out.data() + i), get(together.out.data() + i));
  CHECK_IN(equal, text(sizes));
}

VV_TEST(keys_and_values_may_lie_sample_by_sample) {
  for (const int64_t keys : {9, 1300}) {
    check_apart<float>(keys);
    check_apart<uint16_t>(keys);
  }
}

// Values of a call with one element of query, key or value changed.
template <typename T>
struct Changed {
  explicit Changed(int64_t keys) : problem({1, 1, 3, keys, 20}, false, 6) {}
  void run() { attention(problem.args(), 1); }
  float at(int64_t n, int64_t i) { return get(problem.out.data() + n * (20 + problem.gap()) + i); }
  bool nan_row(int64_t n) {
    bool nan = true;
    for (int64_t i = 0; i < 20; ++i) nan = nan && std::isnan(at(n, i));
    return nan;
  }
  bool finite_row(int64_t n) {
    bool finite = true;
    for (int64_t i = 0; i < 20; ++i) finite = finite && std::isfinite(at(n, i));
    return finite;
  }
  Problem<T> problem;
};

template <typename T>
void check_special(int64_t keys) {
  const float odd_nan = from_bits(0xffc12345u);
  Changed<T> query(keys), key(keys), value(keys), low(keys), high(keys);
  const int64_t row = 20 + query.problem.gap();
  set(query.problem.query.data() + row, sizeof(T) == 4 ? odd_nan : NAN);
  query.run();
  CHECK(query.finite_row(0) && query.nan_row(1) && query.finite_row(2));
  set(key.problem.key.data() + (keys - 1) * row + 3, sizeof(T) == 4 ? odd_nan : NAN);
  key.run();
  CHECK(key.nan_row(0) && key.nan_row(1) && key.nan_row(2));
  set(value.problem.value.data() + 19, NAN);
  value.run();
  for (int64_t n = 0; n < 3; ++n) CHECK(std::isnan(value.at(n, 19)) && std::isfinite(value.at(n, 18)));
  for (int64_t n = 0; n < 3; ++n) {
    set(low.problem.query.data() + n * row, 1.0f);
    set(high.problem.query.data() + n * row, n == 1 ? 1.0f : -1.0f);
  }
  set(low.problem.key.data(), -kInfinity);  // weighs nothing, whatever its value
  set(low.problem.value.data(), 1e30f);
  low.run();
  for (int64_t n = 0; n < 3; ++n) CHECK(low.finite_row(n) && std::fabs(low.at(n, 0)) < 3.0f);
  set(high.problem.key.data(), kInfinity);
  high.run();
  CHECK(high.finite_row(0) && high.nan_row(1) && high.finite_row(2));
}

VV_TEST(attention_passes_nan_and_infinity_on) {
  for (const int64_t keys : {5, 40, 1100}) {
    check_special<float>(keys);
    check_special<uint16_t>(keys);
  }
}

VV_TEST(illegal_calls_of_attention_are_refused) {
  Problem<float> one({1, 2, 3, 4, 8}, false, 1);
  const auto refused = [&](auto change) {
    AttentionArgs args = one.args();
    change(args);
    return refusal([&] { attention(args, 1); });
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(refused([](auto&) {}).empty());
  CHECK(has(refused([](auto& a) { a.query.data = nullptr; }), "query has no memory"));
  CHECK(has(refused([](auto& a) { a.key.data = nullptr; }), "key has no memory"));
  CHECK(has(refused([](auto& a) { a.value.data = nullptr; }), "value has no memory"));
  CHECK(has(refused([](auto& a) { a.out.data = nullptr; }), "out has no memory"));
  CHECK(has(refused([](auto& a) { a.dtype = Dtype::kFloat16; }), "no heads of dtype 2"));
  CHECK(has(refused([](auto& a) { a.keys = -1; }), "is negative"));
  CHECK(has(refused([](auto& a) { a.keys = int64_t{1} << 60; }), "fit no memory"));
  for (const float bad : {0.0f, -1.0f, kInfinity, NAN})
    CHECK(has(refused([&](auto& a) { a.scale = bad; }), "needs a finite number above 0"));
  const void* nowhere[] = {nullptr};
  CHECK(has(refused([&](auto& a) { a.key_at = nowhere; }), "key of sample 0 has no memory"));
  CHECK(has(refused([&](auto& a) { a.value_at = nowhere; }), "value of sample 0 has no memory"));
  CHECK(refused([](auto& a) { a.batch = 0, a.query.data = nullptr; }).empty());
  CHECK(refused([](auto& a) { a.keys = 0, a.key.data = a.value.data = nullptr; }).empty());
}

}  // namespace
}  // namespace vivace::test
