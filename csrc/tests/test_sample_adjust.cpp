// Reductions over a sample: the quantile exactly, the ratio of deviations to double precision.
#include <algorithm>
#include <cmath>

#include "ops/sample_adjust.h"
#include "tests/harness.h"
#include "tests/oracle.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

constexpr int64_t kBatch = 3;

// A reduction row of `kind` over two pool slots, noise and a half-precision network output.
struct Reduction {
  Reduction(uint64_t seed, RowKind kind, int64_t numel, float first, float second)
      : pool(2 * kBatch * numel, 1),
        out(kBatch * numel, 3),
        ints(kIntColumns, 0),
        floats(kFloatColumns, 0.0f),
        rows(kBatch, 0) {
    Random random(seed);
    for (int64_t i = 0; i < pool.size(); ++i)
      pool.data()[i] = static_cast<float>(static_cast<int32_t>(random.word())) * 0x1p-30f;
    for (int64_t i = 0; i < out.size(); ++i) out.data()[i] = static_cast<uint16_t>((random.word() & 0x83ffu) | 0x3c00u);
    if (numel > 3) std::fill(pool.data(), pool.data() + numel / 2, 0.5f);  // many equal values in lane 0
    ints[0] = 4, ints[1] = kind, ints[kKindColumn] = kind;
    const int32_t sources[] = {0, 1, kOutCode, kNoiseCode + 7};
    std::copy(sources, sources + 4, ints.begin() + kSourceColumn);
    std::fill(ints.begin() + kScaleColumn, ints.begin() + kDestinationColumn, -1);
    std::fill(ints.begin() + kDestinationColumn, ints.begin() + kDestinationColumn + kind, kNoCode);
    for (int j = 0; j < 4; ++j)
      floats[j] = static_cast<float>(j % 3) - 0.75f, floats[kMaxSources + j] = 0.3f * static_cast<float>(j);
    floats[kLowColumn] = first, floats[kHighColumn] = second;
    branch = {out.data(), numel, Dtype::kFloat16};
    args.pool = pool.data(), args.slots = 2, args.capacity = kBatch, args.numel = numel;
    args.outs = &branch, args.branches = 1, args.ints = ints.data(), args.floats = floats.data(), args.table_rows = 1;
    args.rows = rows.data(), args.index = index, args.batch = kBatch, args.seeds = index, args.pictures = rows.data();
    args.threads = 1;
  }
  Reduction(const Reduction&) = delete;

  // y_k of one sample.
  std::vector<float> values(int64_t sample, int k) const {
    std::vector<float> all;
    float y[kMaxOutputs];
    for (int64_t e = 0; e < args.numel; ++e) combine(args, sample, e, y), all.push_back(y[k]);
    return all;
  }

  Buffer<float> pool;
  Buffer<uint16_t> out;
  std::vector<int32_t> ints;
  std::vector<float> floats;
  std::vector<int64_t> rows;
  int64_t index[kBatch] = {2, 0, 1};
  Branch branch{};
  SolverStepArgs args{};
};

// torch.quantile(|values|, ratio) of up to 2^24 values: rank in float32, interpolation from the nearer neighbour.
float quantile(std::vector<float> values, float ratio) {
  for (float& value : values) value = std::fabs(value);
  std::sort(values.begin(), values.end());
  const float rank = ratio * static_cast<float>(values.size() - 1), weight = rank - std::floor(rank);
  const float low = values[static_cast<size_t>(rank)], high = values[static_cast<size_t>(std::ceil(rank))];
  return weight < 0.5f ? std::fma(weight, high - low, low) : std::fma(weight - 1.0f, high - low, high);
}

double deviation(const std::vector<float>& values) {
  double mean = 0.0, square = 0.0;
  for (const float value : values) mean += value / static_cast<double>(values.size());
  for (const float value : values) square += (value - mean) * (value - mean);
  return std::sqrt(square / static_cast<double>(values.size() - 1));
}

constexpr int64_t kSizes[] = {1, 2, 3, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 4097};

VV_TEST(the_threshold_is_the_exact_quantile) {
  for (const int64_t numel : kSizes) {
    for (const float ratio : {0.0f, 0.25f, 0.5f, 0.9f, 0.995f, 1.0f}) {
      Reduction one(static_cast<uint64_t>(numel), kThreshold, numel, ratio, 2.5f);
      Buffer<float> adjust(3 * kBatch, 0);
      sample_adjust(one.args, adjust.data());
      for (int64_t b = 0; b < kBatch; ++b) {
        const float s = std::fmin(std::fmax(quantile(one.values(b, 0), ratio), 1.0f), 2.5f);
        const float* got = adjust.data() + 3 * b;
        CHECK_IN(got[0] == -s && got[1] == s && got[2] == 1.0f / s,
                 std::to_string(numel) + " at " + std::to_string(ratio));
      }
    }
  }
}

VV_TEST(a_nan_in_a_sample_gives_nan_for_that_sample_only) {
  Reduction one(3, kThreshold, 65, 0.9f, 9.0f);
  one.pool.data()[64] = NAN;  // lane 0 is sample 1
  float adjust[3 * kBatch];
  sample_adjust(one.args, adjust);
  for (int64_t b = 0; b < kBatch; ++b) CHECK(std::isnan(adjust[3 * b + 1]) == (b == 1));
}

VV_TEST(the_rescale_is_the_ratio_of_deviations) {
  for (const int64_t numel : kSizes) {
    Reduction one(static_cast<uint64_t>(numel), kRescale, numel, 0.7f, 0.0f);
    Buffer<float> adjust(3 * kBatch, 0);
    sample_adjust(one.args, adjust.data());
    for (int64_t b = 0; b < kBatch; ++b) {
      const double want = 0.7f * deviation(one.values(b, 1)) / deviation(one.values(b, 0)) + (1.0 - 0.7f);
      const float got = adjust.data()[3 * b + 2];
      CHECK_IN(std::isnan(want) ? std::isnan(got) : std::fabs(got - want) <= 1e-6 * want, std::to_string(numel));
      CHECK(adjust.data()[3 * b] == -INFINITY && adjust.data()[3 * b + 1] == INFINITY);
    }
  }
}

VV_TEST(reductions_do_not_depend_on_the_threads) {
  for (const RowKind kind : {kThreshold, kRescale}) {
    Reduction one(1, kind, 3 * 32768 + 5, 0.5f, 3.0f);
    float alone[3 * kBatch], both[3 * kBatch];
    sample_adjust(one.args, alone);
    one.args.threads = 2;
    sample_adjust(one.args, both);
    CHECK(std::equal(alone, alone + 3 * kBatch, both));
  }
}

VV_TEST(bad_reduction_rows_are_refused) {
  int refused = 0, edits = 0;
  for (const RowKind kind : {kThreshold, kRescale}) {
    for (const auto& [column, code] : {std::pair<int, int32_t>{kKindColumn, 0},
                                       {kKindColumn, 3},
                                       {kKindColumn, -1},
                                       {1, 0},
                                       {1, 3},
                                       {0, 13},
                                       {kDestinationColumn, 0},
                                       {kDestinationColumn, kNetCode},
                                       {kSourceColumn, 2},
                                       {kSourceColumn + 1, 257},
                                       {kScaleColumn, kTensorCode},
                                       {kAdjustedColumn, 4}}) {
      Reduction one(2, kind, 17, 0.5f, 2.0f);
      one.ints[static_cast<size_t>(column)] = code;
      float adjust[3 * kBatch] = {};
      refused += !refusal([&] { sample_adjust(one.args, adjust); }).empty();
      ++edits;
      CHECK(adjust[0] == 0.0f && adjust[3 * kBatch - 1] == 0.0f);
    }
  }
  CHECK(refused == edits);
  Reduction one(2, kThreshold, 17, 1.5f, 2.0f), two(2, kThreshold, 17, NAN, 2.0f),
      update(2, kThreshold, 17, 0.5f, 2.0f);
  float adjust[3 * kBatch];
  CHECK(!refusal([&] { sample_adjust(one.args, adjust); }).empty());
  CHECK(!refusal([&] { sample_adjust(two.args, adjust); }).empty());
  CHECK(!refusal([&] { solver_step(update.args); }).empty());
}

}  // namespace
}  // namespace vivace::test
