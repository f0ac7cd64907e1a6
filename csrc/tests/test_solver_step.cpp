// The solver step against the definition: sizes, alignments, stores, threads, and random tables, legal and not.
#include <algorithm>
#include <cmath>
#include <thread>

#include "core/float_mode.h"
#include "ops/solver_step.h"
#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

constexpr int64_t kSizes[] = {1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 257};
constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBfloat16, Dtype::kFloat16};

// Memory of a branch output or of the network input, in either width.
struct Plane {
  Plane(Random& random, Dtype dtype, int64_t count, int64_t offset) : dtype(dtype), wide(0, 0), narrow(0, 0) {
    if (dtype == Dtype::kFloat32) {
      wide = Buffer<float>(count, offset);
      for (int64_t i = 0; i < count; ++i) wide.data()[i] = random.value();
    } else {
      narrow = Buffer<uint16_t>(count, offset);
      for (int64_t i = 0; i < count; ++i) narrow.data()[i] = random.half(dtype);
    }
  }
  void* data() { return dtype == Dtype::kFloat32 ? static_cast<void*>(wide.data()) : narrow.data(); }
  float at(int64_t i) const { return dtype == Dtype::kFloat32 ? wide.data()[i] : widen(narrow.data()[i], dtype); }

  Dtype dtype;
  Buffer<float> wide;
  Buffer<uint16_t> narrow;
};

// A call with all its memory, drawn from a seed: every kind of source, scale, destination and clamp.
class Problem {
 public:
  Problem(uint64_t seed, int64_t numel, bool aligned)
      : random_(seed),
        numel_(numel),
        slots_(1 + random_.below(6)),
        capacity_(1 + random_.below(4)),
        pool_(0, 0),
        net_(nullptr) {
    const auto offset = [&] { return aligned ? 0 : random_.below(16); };
    pool_ = Buffer<float>(slots_ * capacity_ * numel, offset());
    for (int64_t i = 0; i < pool_.size(); ++i) pool_.data()[i] = random_.value();
    batch_ = 1 + random_.below(capacity_);
    for (int64_t lane = 0; lane < capacity_; ++lane) index_.push_back(lane);
    for (int64_t i = 0; i < batch_; ++i) std::swap(index_[i], index_[i + random_.below(capacity_ - i)]);
    index_.resize(batch_);
    const int branches = random_.below(3), tensors = random_.below(3);
    for (int b = 0; b < branches; ++b) {
      const int64_t stride = numel + random_.below(2) * 5;
      planes_.emplace_back(random_, kDtypes[random_.below(3)], (batch_ - 1) * stride + numel, offset());
      branches_.push_back({planes_.back().data(), stride, planes_.back().dtype});
    }
    for (int t = 0; t < tensors; ++t) {
      sides_.emplace_back(random_, Dtype::kFloat32, numel, offset());
      tensors_.push_back(sides_.back().wide.data());
    }
    if (random_.chance(70)) {
      nets_.emplace_back(random_, kDtypes[random_.below(3)], capacity_ * numel, offset());
      net_ = &nets_.back();
    }
    for (int64_t b = 0; b < batch_; ++b) {
      rows_.push_back(random_.below(kRows));
      seeds_.push_back(static_cast<int64_t>(uint64_t{random_.word()} << 32 | random_.word()));
      pictures_.push_back(random_.below(1000));
      const float bound = 1.0f + 0.5f * std::fabs(random_.value());
      adjust_.insert(adjust_.end(), {-bound, bound, 1.0f / bound});
    }
    for (int64_t row = 0; row < kRows; ++row) add_row();
  }
  Problem(const Problem&) = delete;

  SolverStepArgs args(int64_t threads, int64_t stream_above) {
    SolverStepArgs a{};
    a.pool = pool_.data(), a.slots = slots_, a.capacity = capacity_, a.numel = numel_;
    a.outs = branches_.data(), a.branches = static_cast<int64_t>(branches_.size());
    a.net = net_ == nullptr ? nullptr : net_->data();
    a.net_dtype = net_ == nullptr ? Dtype::kFloat32 : net_->dtype;
    a.tensors = tensors_.data(), a.tensor_count = static_cast<int64_t>(tensors_.size());
    a.ints = ints_.data(), a.floats = floats_.data(), a.table_rows = kRows;
    a.rows = rows_.data(), a.index = index_.data(), a.batch = batch_;
    a.seeds = seeds_.data(), a.pictures = pictures_.data();
    a.threads = threads, a.stream_above = stream_above, a.adjust = adjust_.data();
    if (!classes_.empty()) {
      a.classes = classes_.data(), a.sizes = sizes_.data(), a.edges = edges_.data();
      a.axes = static_cast<int64_t>(sizes_.size());
    }
    return a;
  }

  // Gives every token of [grid x edges] a class, most of them within the table; the sample holds a few channels.
  void classify(const std::vector<int64_t>& grid, const std::vector<int64_t>& edges) {
    edges_ = edges;
    int64_t tokens = 1;
    for (size_t axis = 0; axis < grid.size(); ++axis) {
      sizes_.push_back(grid[axis] * edges[axis]);
      tokens *= grid[axis];
    }
    for (int64_t& row : rows_) row = random_.below(2);
    const int most = random_.chance(90) ? 2 : 3;
    for (int64_t i = 0; i < batch_ * tokens; ++i) classes_.push_back(static_cast<uint8_t>(random_.below(most)));
  }

  // The row that an element runs.
  int64_t row_of(int64_t b, int64_t e) const {
    if (classes_.empty()) return rows_[b];
    int64_t token = 0, stride = 1;
    for (size_t axis = sizes_.size(); axis-- > 0;) {
      token += e % sizes_[axis] / edges_[axis] * stride;
      e /= sizes_[axis];
      stride *= sizes_[axis] / edges_[axis];
    }
    return rows_[b] + classes_[b * stride + token];
  }

  // Runs the step and compares every element of pool and net, written or not. False when the call was refused.
  bool run(int64_t threads, int64_t stream_above, const std::string& where) {
    const SolverStepArgs a = args(threads, stream_above);
    bool fine = true;
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t e = 0; e < numel_; ++e) fine = fine && row_of(b, e) < kRows && legal(a, row_of(b, e));
    }
    std::vector<float> pool(pool_.data(), pool_.data() + pool_.size()), net;
    for (int64_t i = 0; net_ != nullptr && i < capacity_ * numel_; ++i) net.push_back(net_->at(i));
    for (int64_t b = 0; fine && b < batch_; ++b) {
      for (int64_t e = 0; e < numel_; ++e) {
        float y[kMaxOutputs];
        std::vector<int64_t> rows(batch_, row_of(b, e));
        const int32_t* ints = a.ints + rows[0] * kIntColumns;
        SolverStepArgs one = a;
        one.rows = rows.data();
        combine(one, b, e, y);
        for (int k = 0; k < ints[1]; ++k) {
          const int32_t to = ints[kDestinationColumn + k];
          if (to == kNetCode) net[index_[b] * numel_ + e] = stored(y[k], net_->dtype);
          if (to != kNetCode) pool[(to * capacity_ + index_[b]) * numel_ + e] = y[k];
        }
      }
    }
    const std::string error = refusal([&] { solver_step(a); });
    CHECK_IN(error.empty() == fine, where + ": " + error);
    bool equal = true;
    for (size_t i = 0; i < pool.size(); ++i) equal = equal && same(pool[i], pool_.data()[i]);
    for (size_t i = 0; i < net.size(); ++i) equal = equal && same(net[i], net_->at(static_cast<int64_t>(i)));
    CHECK_IN(equal, where);
    return fine;
  }

  std::vector<int32_t>& ints() { return ints_; }
  Random& random() { return random_; }
  int64_t batch() const { return batch_; }

 private:
  static constexpr int64_t kRows = 3;

  int32_t place() {
    return tensors_.empty() || random_.chance(70) ? random_.below(slots_)
                                                  : kTensorCode + random_.below(tensors_.size());
  }

  int32_t source() {
    const int kind = random_.below(10);
    if (kind < 3 && !branches_.empty()) return kOutCode + random_.below(branches_.size());
    if (kind == 3) return kOneCode;
    if (kind == 4) return kNoiseCode + random_.below(1 << 20);
    return place();
  }

  void add_row() {
    std::vector<int32_t> ints(kIntColumns, 0);
    std::vector<float> floats(kFloatColumns, 0.0f);
    ints[0] = random_.below(kMaxSources + 1), ints[1] = random_.below(kMaxOutputs + 1);
    std::vector<int32_t> free;
    for (int32_t slot = 0; slot < slots_; ++slot) free.push_back(slot);
    if (net_ != nullptr) free.push_back(kNetCode);
    ints[1] = std::min<int32_t>(ints[1], static_cast<int32_t>(free.size()));
    for (int j = 0; j < kMaxSources; ++j) {
      ints[kSourceColumn + j] = source();
      ints[kScaleColumn + j] = random_.chance(75) ? -1 : place();
    }
    for (int k = 0; k < kMaxOutputs; ++k) {
      for (int j = 0; j < kMaxSources; ++j) floats[k * kMaxSources + j] = random_.chance(40) ? 0.0f : random_.value();
      for (int l = 0; l < k; ++l)
        floats[kPrevColumn + k * kMaxOutputs + l] = random_.chance(60) ? 0.0f : random_.value();
      floats[kLowColumn + k] = random_.chance(70) ? -INFINITY : -0.5f;
      floats[kHighColumn + k] = random_.chance(70) ? INFINITY : 0.75f;
      if (k >= ints[1]) continue;
      std::swap(free[k], free[k + random_.below(static_cast<int64_t>(free.size()) - k)]);
      ints[kDestinationColumn + k] = free[k];
    }
    if (random_.chance(40)) ints[kAdjustedColumn] = random_.below(1 << ints[1]);
    ints_.insert(ints_.end(), ints.begin(), ints.end());
    floats_.insert(floats_.end(), floats.begin(), floats.end());
  }

  Random random_;
  int64_t numel_, slots_, capacity_, batch_ = 0;
  Buffer<float> pool_;
  Plane* net_;
  std::vector<Plane> planes_, sides_, nets_;
  std::vector<Branch> branches_;
  std::vector<const float*> tensors_;
  std::vector<int64_t> rows_, index_, seeds_, pictures_, sizes_, edges_;
  std::vector<uint8_t> classes_;
  std::vector<int32_t> ints_;
  std::vector<float> floats_, adjust_;
};

VV_TEST(random_tables_have_the_bits_of_the_definition) {
  uint64_t seed = 0;
  for (const int64_t numel : kSizes) {
    for (int repeat = 0; repeat < 100; ++repeat, ++seed) {
      Problem problem(seed, numel, repeat % 2 == 0);
      problem.run(1 + repeat % 2, repeat % 4 < 2 ? 0 : int64_t{1} << 62, "seed " + std::to_string(seed));
    }
  }
}

VV_TEST(a_large_odd_size_is_exact_at_every_alignment) {
  for (int repeat = 0; repeat < 6; ++repeat) {
    Problem problem(5000 + repeat, 4097, repeat == 0);
    problem.run(2, repeat < 4 ? 0 : int64_t{1} << 62, "large " + std::to_string(repeat));
  }
}

VV_TEST(every_element_runs_the_row_of_its_class) {
  static const std::vector<std::vector<int64_t>> grids[] = {{{1}, {1}},       {{5}, {3}},       {{3, 2}, {2, 2}},
                                                            {{7, 5}, {1, 2}}, {{4, 8}, {2, 2}}, {{2, 3, 2}, {1, 2, 3}},
                                                            {{9, 31}, {3, 2}}};
  int refused = 0, runs = 0;
  for (uint64_t seed = 0; seed < 500; ++seed) {
    const auto& grid = grids[seed % 7];
    int64_t numel = 1 + static_cast<int64_t>(seed % 3);  // channels
    for (size_t axis = 0; axis < grid[0].size(); ++axis) numel *= grid[0][axis] * grid[1][axis];
    Problem problem(40000 + seed, numel, seed % 2 == 0);
    problem.classify(grid[0], grid[1]);
    refused += !problem.run(1 + seed % 2, seed % 4 < 2 ? 0 : int64_t{1} << 62, "classes, seed " + std::to_string(seed));
    ++runs;
  }
  CHECK(refused > 0 && refused < runs / 2);
}

VV_TEST(classes_of_patches_that_do_not_fit_are_refused) {
  Problem problem(11, 48, false);
  problem.classify({2, 4}, {2, 3});
  SolverStepArgs good = problem.args(1, -1);
  const auto refuses = [&](std::vector<int64_t> sizes, std::vector<int64_t> edges) {
    SolverStepArgs args = good;
    args.sizes = sizes.data(), args.edges = edges.data(), args.axes = static_cast<int64_t>(sizes.size());
    return !refusal([&] { solver_step(args); }).empty();
  };
  constexpr int64_t huge = int64_t{1} << 62;
  CHECK(refuses({4, 12}, {2, 5}));
  CHECK(refuses({4, 12}, {2, 0}));
  CHECK(refuses({4, 0}, {2, 1}));
  CHECK(refuses({4, -12}, {2, 3}));
  CHECK(refuses({5, 12}, {5, 3}));
  CHECK(refuses({huge, huge}, {2, 3}));
}

VV_TEST(a_bad_code_is_refused_and_writes_nothing) {
  static const int32_t codes[] = {-1,   -2,   0,    1,    5,     6,     13,        255,      256, 258,
                                  271,  272,  300,  511,  512,   513,   767,       768,      769, 1023,
                                  1024, 1026, 2047, 2048, 65535, 65536, INT32_MAX, INT32_MIN};
  int refused = 0;
  for (uint64_t seed = 0; seed < 5000; ++seed) {
    Problem problem(20000 + seed, 1 + static_cast<int64_t>(seed % 40), false);
    Random& random = problem.random();
    for (int edits = 1 + random.below(3); edits > 0; --edits) {
      const int row = random.below(3), column = random.below(kIntColumns);
      const int32_t code = random.chance(80) ? codes[random.below(28)] : static_cast<int32_t>(random.word());
      problem.ints()[row * kIntColumns + column] = code;
    }
    refused += !problem.run(1, seed % 2 ? 0 : int64_t{1} << 62, "bad code, seed " + std::to_string(seed));
  }
  CHECK(refused > 1000);
}

VV_TEST(a_bad_size_row_or_lane_is_refused) {
  Problem problem(3, 40, false);
  SolverStepArgs good = problem.args(1, -1);
  const auto refuses = [&](auto change) {
    SolverStepArgs args = good;
    change(args);
    return !refusal([&] { solver_step(args); }).empty();
  };
  const int64_t huge = int64_t{1} << 62;
  CHECK(refuses([&](SolverStepArgs& a) { a.numel = -1; }));
  CHECK(refuses([&](SolverStepArgs& a) { a.slots = -1; }));
  CHECK(refuses([&](SolverStepArgs& a) { a.capacity = -1; }));
  CHECK(refuses([&](SolverStepArgs& a) { a.batch = -1; }));
  CHECK(refuses([&](SolverStepArgs& a) { a.table_rows = -1; }));
  CHECK(refuses([&](SolverStepArgs& a) { a.slots = 257; }));
  CHECK(refuses([&](SolverStepArgs& a) { a.numel = huge; }));
  CHECK(refuses([&](SolverStepArgs& a) { a.capacity = huge; }));
  CHECK(refuses([&](SolverStepArgs& a) { a.branches = 17; }));
  CHECK(refuses([&](SolverStepArgs& a) { a.tensor_count = 1025; }));
  for (const int64_t stride : {huge, -huge, INT64_MIN}) {
    const Branch far = {problem.ints().data(), stride, Dtype::kFloat32};
    CHECK(refuses([&](SolverStepArgs& a) { a.outs = &far, a.branches = 1; }));
  }
  for (const int64_t bad : {int64_t{-1}, int64_t{3}, huge, INT64_MIN}) {
    std::vector<int64_t> rows(4, bad), lanes(4, bad == 3 ? 4 : bad);
    CHECK(refuses([&](SolverStepArgs& a) { a.rows = rows.data(); }));
    CHECK(refuses([&](SolverStepArgs& a) { a.index = lanes.data(); }));
  }
  const std::vector<int64_t> rows(2, 0), twice(2, 0);
  CHECK(refuses([&](SolverStepArgs& a) { a.batch = 2, a.rows = rows.data(), a.index = twice.data(); }));
}

VV_TEST(an_empty_call_touches_no_memory) {
  SolverStepArgs args{};
  args.threads = 2;
  solver_step(args);
  args.slots = 2, args.capacity = 3;  // and numel 0
  solver_step(args);
  CHECK(true);
}

// Slot 1 <- 0.5 * slot 0 + 0.25 * slot 1 for many samples: enough bytes for two threads and several chunks.
struct Wide {
  static constexpr int64_t kNumel = 3 * 32768 + 17, kBatch = 9;
  Wide() : pool(2 * kBatch * kNumel, 3), ints(kIntColumns, 0), floats(kFloatColumns, 0.0f), rows(kBatch, 0) {
    Random random(9);
    for (int64_t i = 0; i < pool.size(); ++i) pool.data()[i] = static_cast<float>(random.word()) * 0x1p-31f;
    ints[0] = 2, ints[1] = 1, ints[kSourceColumn + 1] = 1, ints[kDestinationColumn] = 1;
    std::fill(ints.begin() + kScaleColumn, ints.begin() + kDestinationColumn, -1);
    floats[0] = 0.5f, floats[1] = 0.25f, floats[kLowColumn] = -INFINITY, floats[kHighColumn] = INFINITY;
    for (int64_t b = 0; b < kBatch; ++b) index.push_back(kBatch - 1 - b);
  }
  SolverStepArgs args(int64_t threads) {
    SolverStepArgs a{};
    a.pool = pool.data(), a.slots = 2, a.capacity = kBatch, a.numel = kNumel;
    a.ints = ints.data(), a.floats = floats.data(), a.table_rows = 1;
    a.rows = rows.data(), a.index = index.data(), a.batch = kBatch, a.threads = threads, a.stream_above = 0;
    return a;
  }
  Buffer<float> pool;
  std::vector<int32_t> ints;
  std::vector<float> floats;
  std::vector<int64_t> rows, index;
};

VV_TEST(threads_share_the_work_without_a_gap) {
  for (const int64_t threads : {1, 2}) {
    Wide wide;
    const std::vector<float> before(wide.pool.data(), wide.pool.data() + wide.pool.size());
    solver_step(wide.args(threads));
    const size_t half = before.size() / 2;
    bool right = true;
    for (size_t i = 0; i < half; ++i)
      right = right && wide.pool.data()[half + i] == 0.5f * before[i] + 0.25f * before[half + i];
    CHECK(right);
    CHECK(std::equal(before.begin(), before.begin() + half, wide.pool.data()));
  }
}

VV_TEST(callers_at_the_same_time_do_not_disturb_each_other) {
  Wide one, two, expected;
  solver_step(expected.args(1));
  std::thread other([&] { solver_step(two.args(2)); });
  solver_step(one.args(2));
  other.join();
  CHECK(std::equal(one.pool.data(), one.pool.data() + one.pool.size(), expected.pool.data()));
  CHECK(std::equal(two.pool.data(), two.pool.data() + two.pool.size(), expected.pool.data()));
}

#ifdef VIVACE_X86
VV_TEST(flush_to_zero_of_the_caller_changes_nothing) {
  const unsigned mode = _mm_getcsr();
  for (uint64_t seed = 0; seed < 10; ++seed) {
    Problem plain(seed, 33, false), flushed(seed, 33, false);
    const SolverStepArgs a = plain.args(1, -1), b = flushed.args(1, -1);
    solver_step(a);
    _mm_setcsr(mode | 0x8040);
    solver_step(b);
    _mm_setcsr(mode);
    bool equal = true;
    for (int64_t i = 0; i < a.slots * a.capacity * a.numel; ++i) equal = equal && same(a.pool[i], b.pool[i]);
    CHECK(equal);
  }
}
#endif

}  // namespace
}  // namespace vivace::test
