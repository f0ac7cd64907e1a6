// Rows of a tiny DiT that keep what halves and ranges of blocks give, give it again, and start where a look ended.
#include <cmath>
#include <string>
#include <vector>

#include "tests/allocations.h"
#include "tests/dit_model.h"

namespace vivace::test {
namespace {

constexpr Dtype kF = Dtype::kFloat32, kB = Dtype::kBfloat16, kI = Dtype::kInt8;
constexpr int64_t kHalves = 2 * kLayers;

// Uses with memory for every row: `planes` planes each of float32.
struct Kept {
  Kept(int64_t rows, int64_t tokens, int64_t planes, Dtype store = kF)
      : rows(rows),
        elements(planes * tokens * kWidth),
        store(store),
        memory((kHalves + 1) * rows * elements * dtype_size(store), 0),
        scales((kHalves + 1) * rows * planes * tokens, 0),
        weights(rows * planes, 0) {
    for (int64_t cell = 0; cell <= kHalves; ++cell) {
      for (int64_t row = 0; row < rows; ++row)
        lanes.push_back({memory.data() + (cell * rows + row) * elements * dtype_size(store),
                         scales.data() + (cell * rows + row) * planes * tokens});
    }
    for (int64_t i = 0; i < rows * planes; ++i) weights.data()[i] = i % planes == 0 ? 1.0f : 0.5f;
  }

  // Memory number `cell` of every row.
  DitUse use(DitAction action, DitCell cell, int64_t at, int64_t until, int64_t number, int64_t terms = 1) {
    const KeptRows held{lanes.data() + number * rows, store};
    return {action, cell, at, until, 0, terms, held, weights.data()};
  }
  std::vector<DitUse> keep_halves() {
    std::vector<DitUse> made;
    for (int64_t h = 0; h < kHalves; ++h) made.push_back(use(DitAction::kKeep, DitCell::kHalf, h + 1, h + 1, h));
    return made;
  }
  std::vector<DitUse> apply_halves(int64_t terms = 1) {
    std::vector<DitUse> made;
    for (int64_t h = 0; h < kHalves; ++h) made.push_back(use(DitAction::kApply, DitCell::kHalf, h, h + 1, h, terms));
    return made;
  }
  // Of blocks [first, last).
  std::vector<DitUse> keep_range(DitCell cell, int64_t first, int64_t last) {
    const DitUse keep = use(DitAction::kKeep, cell, 2 * last, 2 * last, kHalves);
    if (cell == DitCell::kBlock) return {keep};
    return {use(DitAction::kOpen, cell, 2 * first, 2 * first, kHalves), keep};
  }
  std::vector<DitUse> apply_range(DitCell cell, int64_t first, int64_t last) {
    return {use(DitAction::kApply, cell, 2 * first, 2 * last, kHalves)};
  }

  int64_t rows, elements;
  Dtype store;
  Buffer<char> memory;
  Buffer<float> scales, weights;
  std::vector<KeptRow> lanes{};
};

std::vector<float> run(Problem& problem, const std::vector<DitUse>& uses, int64_t threads = 2) {
  DitCall call = problem.call(threads);
  call.uses = uses.data(), call.use_count = static_cast<int64_t>(uses.size());
  problem.dit.run(call);
  return {problem.out.data(), problem.out.data() + problem.out.size()};
}

bool equal(const std::vector<float>& a, const std::vector<float>& b) {
  bool equal = a.size() == b.size();
  for (size_t i = 0; equal && i < a.size(); ++i) equal = same(a[i], b[i]);
  return equal;
}

double apart(const std::vector<float>& a, const std::vector<float>& b) {
  double off = 0.0, size = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    off += difference * difference, size += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return std::sqrt(off / size);
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

VV_TEST(a_row_that_keeps_has_the_bits_of_one_that_does_not) {
  for (const Model& model : models()) {
    for (const Dtype store : {kF, kB, kI}) {
      Problem one(model, {2, 0, 3}, 2, 6, 4);
      Kept kept(6, 6, 1, store);
      const auto plain = run(one, {});
      CHECK(equal(run(one, kept.keep_halves()), plain));
      for (const DitCell cell : {DitCell::kResidual, DitCell::kBlock}) {
        CHECK(equal(run(one, kept.keep_range(cell, 0, kLayers)), plain));
        CHECK(equal(run(one, kept.keep_range(cell, 1, kLayers)), plain));
        CHECK(equal(run(one, kept.keep_range(cell, 0, 1)), plain));
      }
    }
  }
}

VV_TEST(what_was_kept_of_the_same_input_gives_the_same_row) {
  for (const Model& model : models()) {
    Problem one(model, {2, 0, 3}, 2, 6, 4);
    Kept kept(6, 6, 1);
    const auto plain = run(one, kept.keep_halves());
    CHECK(equal(run(one, kept.apply_halves()), plain));
    auto some = kept.apply_halves();
    some.erase(some.begin() + 1, some.begin() + 3);
    CHECK(equal(run(one, some), plain));
    run(one, kept.keep_range(DitCell::kBlock, 0, 1));
    CHECK(equal(run(one, kept.apply_range(DitCell::kBlock, 0, 1)), plain));
    run(one, kept.keep_range(DitCell::kResidual, 0, kLayers));
    CHECK(apart(run(one, kept.apply_range(DitCell::kResidual, 0, kLayers)), plain) < 1e-5);
    kept = Kept(6, 6, 1, kI);
    run(one, kept.keep_halves());
    const double off = apart(run(one, kept.apply_halves()), plain);
    CHECK_IN(off < 0.05 && off > 0.0, std::to_string(off));
  }
}

VV_TEST(weights_are_those_of_planes) {
  const Model model(kF, Activation::kGelu);
  Problem one(model, {1}, 1, 6, 4);
  Kept kept(1, 6, 2);
  const auto plain = run(one, {});
  auto uses = kept.keep_halves();
  run(one, uses);
  for (DitUse& use : uses) use.made = 1;
  run(one, uses);  // the same input again: its difference is 0
  CHECK(equal(run(one, kept.apply_halves(2)), plain));
  kept.weights.data()[0] = 0.0f, kept.weights.data()[1] = 1.0f;
  for (float* gate = one.modulation.data(); gate < one.modulation.data() + one.modulation.size(); gate += kWidth)
    if ((gate - one.modulation.data()) / kWidth % kVectors % 3 == 2 &&
        (gate - one.modulation.data()) / kWidth % kVectors < 6 * kLayers)
      std::fill(gate, gate + kWidth, 0.0f);
  CHECK(equal(run(one, kept.apply_halves(2)), run(one, {})));
}

VV_TEST(the_bits_of_a_sample_that_reuses_do_not_depend_on_the_others) {
  for (const Model& model : models()) {
    Problem all(model, {3, 1, 0}, 2, 6, 8);
    Kept kept(6, 12, 1, kB);
    run(all, kept.keep_halves());
    auto uses = kept.apply_halves();
    uses.erase(uses.begin() + 1);
    const auto whole = run(all, uses);
    for (const int64_t threads : {1, 3, 64}) CHECK(equal(run(all, uses, threads), whole));
    for (int64_t j = 0; j < 3; ++j) {
      Problem alone(model, {all.lanes[static_cast<size_t>(j)]}, 1, 6, 8);
      Kept own(1, 12, 1, kB);
      run(alone, own.keep_halves(), 1);
      auto mine = own.apply_halves();
      mine.erase(mine.begin() + 1);
      const auto found = run(alone, mine, 1);
      CHECK(equal(found, {whole.begin() + j * all.image, whole.begin() + (j + 1) * all.image}));
    }
  }
}

VV_TEST(a_row_that_starts_where_a_look_ended_has_the_bits_of_a_whole_one) {
  for (const Model& model : models()) {
    for (int64_t blocks = 0; blocks <= kLayers; ++blocks) {
      Problem one(model, {2, 0, 3}, 2, 6, 4);
      Kept kept(6, 6, 1);
      const int64_t elements = 6 * kWidth;
      Buffer<float> states(6 * elements, 0, NAN), signal(6 * elements, 0, NAN);
      DitCall call = one.call(2);
      call.last = blocks, call.to = states.data(), call.signal = signal.data();
      one.dit.run(call);
      std::vector<const float*> from;
      for (int64_t row = 0; row < 6; ++row) from.push_back(states.data() + row * elements);
      bool finite = true, odd = false;
      for (int64_t i = 0; i < 6 * elements; ++i) {
        finite = finite && std::isfinite(signal.data()[i]);
        odd = odd || signal.data()[i] != 0.0f;
      }
      CHECK(finite && odd);
      const auto plain = run(one, {});
      for (const auto& uses : {std::vector<DitUse>(), kept.keep_range(DitCell::kResidual, blocks, kLayers)}) {
        if (!uses.empty() && blocks == kLayers) continue;
        call = one.call(2);
        call.first = blocks, call.from = from.data();
        call.uses = uses.data(), call.use_count = static_cast<int64_t>(uses.size());
        one.dit.run(call);
        CHECK(equal({one.out.data(), one.out.data() + one.out.size()}, plain));
      }
    }
  }
}

VV_TEST(a_row_that_keeps_and_reuses_allocates_nothing) {
  const Model model(kB, Activation::kGelu);
  Problem one(model, {0, 1}, 2, 6, 6);
  Kept kept(4, 9, 1, kI);
  for (const auto& uses : {kept.keep_halves(), kept.apply_halves(), kept.keep_range(DitCell::kResidual, 0, 1)}) {
    run(one, uses);
    DitCall call = one.call(2);
    call.uses = uses.data(), call.use_count = static_cast<int64_t>(uses.size());
    const int64_t before = allocations();
    one.dit.run(call);
    const int64_t asked = allocations() - before;
    CHECK(asked == 0 && before > 0);
  }
}

VV_TEST(uses_that_do_not_fit_are_refused) {
  const Model model(kF, Activation::kGelu);
  Problem one(model, {0, 1}, 1, 4, 4);
  Kept kept(2, 4, 1);
  const auto refused = [&](std::vector<DitUse> uses, auto change) {
    DitCall call = one.call(1);
    change(uses, call);
    call.uses = uses.data(), call.use_count = static_cast<int64_t>(uses.size());
    return refusal([&] { one.dit.run(call); });
  };
  const auto as_is = [](auto&, auto&) {};
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  const auto keeps = kept.keep_halves(), applies = kept.apply_halves();
  const auto opens = kept.keep_range(DitCell::kResidual, 0, 1);
  CHECK(refused(keeps, as_is).empty() && refused(applies, as_is).empty() && refused(opens, as_is).empty());
  CHECK(has(refused({keeps[1], keeps[0]}, as_is), "use 1 of halves from 1 is out of order"));
  CHECK(has(refused({applies[0], keeps[0]}, as_is), "use 1 keeps half 0, which is not what came before"));
  CHECK(has(refused({opens[1]}, as_is), "use 0 keeps a range that was not opened"));
  CHECK(has(refused({opens[0], opens[0]}, as_is), "use 1 opens a range inside another"));
  CHECK(has(refused(applies, [](auto& u, auto&) { u[0].until = 3; }), "use 0 is of halves 0 to 3 of 4"));
  CHECK(has(refused(applies, [](auto& u, auto&) { u[3].at = 4, u[3].until = 5; }), "use 3 is of halves 4 to 5 of 4"));
  CHECK(has(refused(applies, [](auto& u, auto&) { u[0].weights = nullptr; }), "use 0 has no weights"));
  CHECK(has(refused(applies, [](auto& u, auto&) { u[0].terms = 0; }), "use 0 has no weights"));
  CHECK(has(refused(keeps, [](auto& u, auto&) { u[1].made = -1; }), "use 1 makes -1 differences"));
  CHECK(has(refused(opens, [](auto& u, auto&) { u[0].cell = DitCell::kBlock; }), "opens a range that keeps no"));
  const KeptRow none[] = {{nullptr, nullptr}, {nullptr, nullptr}};
  CHECK(!refused(keeps, [&](auto& u, auto&) { u[0].kept.rows = none; }).empty());
  CHECK(has(refused({}, [](auto&, auto& c) { c.first = 1; }), "begins at block 1 needs hidden states"));
  CHECK(has(refused({}, [](auto&, auto& c) { c.first = 3; }), "blocks 3 to 2 are not some of 2"));
  CHECK(has(refused({}, [](auto&, auto& c) { c.last = 1; }), "a look needs memory"));
  const float* starts[] = {one.x.data(), nullptr};
  CHECK(has(refused({}, [&](auto&, auto& c) { c.from = starts; }), "hidden states have no memory"));
  Buffer<float> room(2 * 4 * kWidth, 0);
  const auto looks = [&](auto&, auto& c) { c.last = 1, c.to = c.signal = room.data(); };
  CHECK(has(refused(applies, looks), "a look keeps and reuses nothing") && refused({}, looks).empty());
}

}  // namespace
}  // namespace vivace::test
