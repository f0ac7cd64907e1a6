// Rows of a tiny DiT that compute some of the tokens and read kept keys and values of the others.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tests/allocations.h"
#include "tests/dit_model.h"

namespace vivace::test {
namespace {

constexpr Dtype kF = Dtype::kFloat32, kB = Dtype::kBfloat16, kI = Dtype::kInt8;
using Ids = std::vector<std::vector<int32_t>>;  // of each sample

// Keys and values of every block and row.
struct Keys {
  Keys(const Model& model, int64_t rows, int64_t tokens, Dtype wanted = Dtype::kFloat16)
      : memory(kLayers * rows * tokens * 2 * kWidth * 4, 0), scales(kLayers * rows * tokens, 0) {
    for (int64_t i = 0; i < kLayers * rows; ++i)
      lanes.push_back({memory.data() + i * tokens * 2 * kWidth * 4, scales.data() + i * tokens});
    for (int64_t b = 0; b < kLayers; ++b) {
      const Dtype store = wanted == Dtype::kFloat16 ? model.kinds[static_cast<size_t>(b)].attention : wanted;
      uses.push_back(
          {DitAction::kKeys, DitCell::kHeads, 2 * b, 2 * b, 0, 0, {lanes.data() + b * rows, store}, nullptr});
    }
  }

  Buffer<char> memory;
  Buffer<float> scales;
  std::vector<KeptRow> lanes{};
  std::vector<DitUse> uses{};
};

std::vector<float> run(Problem& problem, const std::vector<DitUse>& uses, const Ids& ids, int64_t threads = 2) {
  problem.some = true;
  std::vector<int32_t> flat;
  for (const auto& one : ids) flat.insert(flat.end(), one.begin(), one.end());
  std::fill(problem.out.data(), problem.out.data() + problem.out.size(), 7.0f);
  DitCall call = problem.call(threads);
  call.uses = uses.data(), call.use_count = static_cast<int64_t>(uses.size());
  if (!ids.empty()) call.ids = flat.data(), call.active = static_cast<int64_t>(ids[0].size());
  problem.dit.run(call);
  return {problem.out.data(), problem.out.data() + problem.out.size()};
}

bool equal(const std::vector<float>& a, const std::vector<float>& b) {
  bool equal = a.size() == b.size();
  for (size_t i = 0; equal && i < a.size(); ++i) equal = same(a[i], b[i]);
  return equal;
}

// The token of a pixel of a prediction.
int32_t token_of(const Problem& one, int64_t i) {
  const int64_t row = i % (one.height * one.width) / one.width, column = i % one.width;
  return static_cast<int32_t>(row / kPatch * (one.width / kPatch) + column / kPatch);
}

bool active(const std::vector<int32_t>& ids, int32_t token) {
  return std::find(ids.begin(), ids.end(), token) != ids.end();
}

std::vector<Model> models() {
  std::vector<Model> made;
  made.emplace_back(kF, Activation::kGelu);
  made.emplace_back(kB, Activation::kGeluTanh);
  made.emplace_back(kB, Activation::kGelu, std::vector<BlockKinds>{all_of(kI), all_of(kI)});
  made.emplace_back(kF, Activation::kGelu,
                    std::vector<BlockKinds>{{{kI, kB, kF, kF}, kB, kF}, {{kF, kI, kB, kI}, kF, kB}});
  return made;
}

const Ids kSome{{0, 4, 5, 7, 11}, {1, 2, 3, 8, 9}, {3, 5, 6, 10, 11}};
const Ids kLater{{2, 11}, {0, 1}, {6, 9}};

Ids all_tokens(int64_t tokens, size_t samples) {
  std::vector<int32_t> every;
  for (int32_t i = 0; i < tokens; ++i) every.push_back(i);
  return Ids(samples, every);
}

// Three rows, of all tokens, of some and of others, whose latents differ, against dense ones with older keys and
// values.
void check_against_double(Dtype dtype, double tolerance) {
  const Model model(dtype, Activation::kGeluTanh);
  Problem one(model, {2, 0, 3}, 2, 6, 8);
  Keys keys(model, 6, 12);
  std::vector<Model::Heads> heads(6);
  double worst = 0.0, largest = 0.0;
  for (const Ids& ids : {Ids{}, kSome, kLater}) {
    run(one, keys.uses, ids);
    for (int64_t row = 0; row < 6; ++row) {
      const int64_t b = row / 3, j = row % 3;
      const auto mine = ids.empty() ? all_tokens(12, 1)[0] : ids[static_cast<size_t>(j)];
      auto& fresh = heads[static_cast<size_t>(row)].fresh;
      for (int32_t t = 0; t < 12; ++t) fresh.resize(12), fresh[static_cast<size_t>(t)] = active(mine, t);
      const auto want =
          model(one.latent(j), one.vectors(b, j), one.positions.data(), 6, 8, &heads[static_cast<size_t>(row)]);
      for (int64_t i = 0; i < one.image; ++i) {
        if (!active(mine, token_of(one, i))) continue;
        const double off = std::fabs(one.result(b, j)[i] - want[static_cast<size_t>(i)]);
        worst = off <= worst ? worst : off;  // NaN is the worst
        largest = std::max(largest, std::fabs(want[static_cast<size_t>(i)]));
      }
    }
    for (int64_t i = 0; i < one.x.size(); ++i) one.x.data()[i] = stored(0.5f * one.x.data()[i] + 0.25f, dtype);
  }
  CHECK_IN(worst <= tolerance * largest, std::to_string(worst) + " of " + std::to_string(largest));
}

VV_TEST(rows_of_some_tokens_in_float32_are_those_of_double) { check_against_double(kF, 2e-6); }
VV_TEST(rows_of_some_tokens_in_bfloat16_are_those_of_double) { check_against_double(kB, 2e-2); }

VV_TEST(a_row_of_all_tokens_by_their_ids_has_the_bits_of_a_plain_one) {
  for (const Model& model : models()) {
    Problem one(model, {2, 0, 3}, 2, 6, 8);
    Keys keys(model, 6, 12);
    const auto plain = run(one, {}, {});
    CHECK(equal(run(one, keys.uses, all_tokens(12, 3)), plain));
    CHECK(equal(run(one, keys.uses, {}), plain));
  }
}

VV_TEST(a_token_has_the_bits_of_a_full_row_on_the_input_that_was_kept) {
  for (const Model& model : models()) {
    Problem one(model, {2, 0, 3}, 2, 6, 8);
    Keys keys(model, 6, 12);
    const auto full = run(one, keys.uses, {});
    for (const Ids& ids : {kSome, kLater}) {
      const auto found = run(one, keys.uses, ids);
      bool right = true;
      for (size_t i = 0; i < found.size(); ++i) {
        const auto at = static_cast<int64_t>(i);
        const auto sample = static_cast<size_t>(at / one.image % 3);
        right = right && same(found[i], active(ids[sample], token_of(one, at)) ? full[i] : 7.0f);
      }
      CHECK(right);
    }
  }
}

VV_TEST(keys_and_values_in_other_stores_are_near_those_of_the_heads) {
  for (const Model& model : models()) {
    Problem one(model, {2, 0, 3}, 2, 6, 8);
    Keys exact(model, 6, 12);
    run(one, exact.uses, {});
    const auto want = run(one, exact.uses, kSome);
    for (const Dtype store : {kF, kB, kI}) {
      Keys keys(model, 6, 12, store);
      run(one, keys.uses, {});
      const auto found = run(one, keys.uses, kSome);
      double off = 0.0, size = 0.0;
      for (size_t i = 0; i < found.size(); ++i) {
        const double difference = static_cast<double>(found[i]) - static_cast<double>(want[i]);
        off += difference * difference, size += static_cast<double>(want[i]) * static_cast<double>(want[i]);
      }
      const bool wider =
          store == kF || (model.kinds[0].attention == kB && store == kB && model.kinds[1].attention == kB);
      CHECK_IN(wider ? off == 0.0 : off < 0.0025 * size, std::to_string(off) + " of " + std::to_string(size));
    }
  }
}

VV_TEST(the_bits_of_a_sample_do_not_depend_on_the_tokens_of_others) {
  for (const Model& model : models()) {
    for (const Dtype store : {Dtype::kFloat16, kI}) {  // that of the heads, and one that is not
      Problem all(model, {3, 1, 0}, 2, 6, 8);
      Keys keys(model, 6, 12, store);
      run(all, keys.uses, {});
      const auto whole = run(all, keys.uses, kSome);
      for (const int64_t threads : {1, 3, 64}) CHECK(equal(run(all, keys.uses, kSome, threads), whole));
      for (int64_t j = 0; j < 3; ++j) {
        Problem alone(model, {all.lanes[static_cast<size_t>(j)]}, 1, 6, 8);
        Keys own(model, 1, 12, store);
        run(alone, own.uses, {}, 1);
        const auto found = run(alone, own.uses, {kSome[static_cast<size_t>(j)]}, 1);
        CHECK(equal(found, {whole.begin() + j * all.image, whole.begin() + (j + 1) * all.image}));
      }
    }
  }
}

VV_TEST(halves_kept_of_some_tokens_are_given_to_rows_of_all_and_of_some) {
  for (const Model& model : models()) {
    Problem one(model, {2, 0, 3}, 2, 6, 8);
    Keys keys(model, 6, 12);
    Buffer<float> memory(6 * 12 * kWidth, 0), ones(6, 0);
    std::fill(ones.data(), ones.data() + 6, 1.0f);
    std::vector<KeptRow> rows;
    for (int64_t r = 0; r < 6; ++r) rows.push_back({memory.data() + r * 12 * kWidth, nullptr});
    const DitUse keep{DitAction::kKeep, DitCell::kHalf, 2, 2, 0, 0, {rows.data(), kF}, nullptr};
    const DitUse apply{DitAction::kApply, DitCell::kHalf, 1, 2, 0, 1, {rows.data(), kF}, ones.data()};
    const auto with = [&](const DitUse& use) { return std::vector<DitUse>{keys.uses[0], use, keys.uses[1]}; };
    const auto full = run(one, keys.uses, {});
    for (const Ids& ids : {kSome, all_tokens(12, 3)}) {  // on one input: the same bits, wherever a token's value lies
      const auto some = run(one, keys.uses, ids);
      CHECK(equal(run(one, with(keep), ids), some));
      CHECK(equal(run(one, with(apply), ids), some));
    }
    CHECK(equal(run(one, with(apply), {}), full));
  }
}

VV_TEST(a_row_of_some_tokens_allocates_nothing) {
  const Model model(kB, Activation::kGelu);
  Problem one(model, {0, 1}, 2, 6, 8);
  Keys keys(model, 4, 12), packed(model, 4, 12, kI);
  one.some = true;
  const int32_t ids[] = {0, 3, 5, 1, 2, 11};
  for (const auto& uses : {keys.uses, packed.uses}) {
    DitCall call = one.call(2);
    call.uses = uses.data(), call.use_count = kLayers, call.ids = ids, call.active = 3;
    one.dit.run(call);
    const int64_t before = allocations();
    one.dit.run(call);
    const int64_t asked = allocations() - before;
    CHECK(asked == 0 && before > 0);
  }
}

VV_TEST(an_arena_holds_every_call_of_fewer_tokens) {
  const Model model(kF, Activation::kGelu);
  for (const int64_t side : {2, 8}) {
    Problem one(model, {1}, 1, side, side);
    const int64_t tokens = side * side / 4;
    Keys keys(model, 1, tokens, kB);
    for (int32_t count = 1; count <= tokens; ++count) {
      std::vector<int32_t> first;
      for (int32_t i = 0; i < count; ++i) first.push_back(i);
      const auto found = run(one, keys.uses, {first});
      CHECK(std::none_of(found.begin(), found.end(), [](float y) { return std::isnan(y); }));
    }
  }
}

VV_TEST(calls_of_some_tokens_that_do_not_fit_are_refused) {
  const Model model(kF, Activation::kGelu);
  Problem one(model, {0, 1}, 1, 4, 4);
  Keys keys(model, 2, 4);
  one.some = true;
  const auto refused = [&](std::vector<int32_t> ids, auto change) {
    std::vector<DitUse> uses = keys.uses;
    DitCall call = one.call(1);
    call.ids = ids.data(), call.active = static_cast<int64_t>(ids.size()) / 2;
    change(uses, call);
    call.uses = uses.data(), call.use_count = static_cast<int64_t>(uses.size());
    return refusal([&] { one.dit.run(call); });
  };
  const auto as_is = [](auto&, auto&) {};
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(refused({0, 1, 2, 3}, as_is).empty() && refused({3, 0}, as_is).empty());
  CHECK(has(refused({0, 1, 3, 2}, as_is), "token 2 after 3 of 4; ids ascend"));
  CHECK(has(refused({0, 0, 2, 3}, as_is), "token 0 after 0"));
  CHECK(has(refused({-1, 0, 2, 3}, as_is), "token -1 after -1"));
  CHECK(has(refused({0, 1, 2, 4}, as_is), "token 4 after 2 of 4"));
  CHECK(has(refused({0, 1}, [](auto&, auto& c) { c.active = 0; }), "0 active tokens of 4"));
  CHECK(has(refused({0, 1}, [](auto&, auto& c) { c.active = 5; }), "5 active tokens of 4"));
  CHECK(has(refused({0, 1}, [](auto& u, auto&) { u.pop_back(); }), "block 1 of a row of some tokens has no kept keys"));
  CHECK(has(refused({0, 1}, [](auto& u, auto&) { u[0].cell = DitCell::kHalf; }), "otherwise than of an attention"));
  CHECK(has(refused({0, 1}, [](auto& u, auto& c) { u[0].at = u[0].until = 1, c.ids = nullptr; }),
            "half 1, which is no attention that runs"));
  CHECK(has(refused({0, 1}, [](auto& u, auto&) { u[0].action = DitAction::kKeep; }), "otherwise than of an attention"));
  const float* starts[] = {one.x.data(), one.x.data()};
  CHECK(has(refused({0, 1}, [&](auto&, auto& c) { c.from = starts; }), "begins with its stem"));
  one.some = false;  // an arena for plain rows alone
  CHECK(has(refused({0, 1, 2, 3, 0, 1, 2, 3}, as_is), "the arena has"));
}

}  // namespace
}  // namespace vivace::test
