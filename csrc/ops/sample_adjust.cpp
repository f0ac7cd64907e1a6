// Each reduction goes over its sample two or three times, computing y anew in pieces that stay in the first-level
// cache: nothing of the sample's size is stored, and a sample is reduced by one thread in one order.
#include "ops/sample_adjust.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/float_mode.h"
#include "core/thread_pool.h"
#include "ops/step_rows.h"
#include "simd/cpu.h"
#include "simd/kernels.h"

namespace vivace {
namespace {

constexpr int64_t kPiece = 2048;                    // a multiple of every block and of kMomentLanes
constexpr int64_t kMaxElements = int64_t{1} << 31;  // counts are 32-bit
constexpr int kPasses = 3;

// The combinations y_0, y_1 of one sample, a piece at a time.
class Combinations {
 public:
  Combinations(const StepProgram& program, int64_t numel) : program_(program), numel_(numel) {
    for (int k = 0; k < program_.outputs; ++k) program_.output[k].data = y_[k];
  }

  // body(y, count) for every piece; y[k] points to `count` values of y_k.
  template <typename Body>
  void each_piece(const Body& body) {
    const float* const y[2] = {y_[0], y_[1]};
    for (int64_t begin = 0; begin < numel_; begin += kPiece) {
      const int64_t count = std::min(kPiece, numel_ - begin);
      kernels().step_span(shifted(program_, begin), 0, count);
      body(y, count);
    }
  }

 private:
  StepProgram program_;
  int64_t numel_;
  alignas(64) float y_[2][kPiece];
};

float value_of(uint32_t key) {
  float value;
  std::memcpy(&value, &key, 4);
  return value;
}

// Linear interpolation as torch computes it: from the nearer end, with one rounding.
float lerp(float start, float end, float weight) {
  const bool near = weight < 0.5f;
  return std::fma(near ? weight : weight - 1.0f, end - start, near ? start : end);
}

// torch.quantile(|y_0|, ratio) by radix selection: three rounds fix 11, 10 and 10 bits of the key of the lower
// neighbour. The upper one is the same, or the next key in its last bin, or the smallest above it.
float quantile(Combinations& sample, int64_t numel, float ratio) {
  const auto last = static_cast<double>(numel - 1);  // torch takes the rank in float32, and refuses samples above 2^24
  const double rank = numel <= 1 << 24 ? static_cast<double>(ratio * static_cast<float>(last)) : ratio * last;
  const auto lower = static_cast<int64_t>(std::floor(rank));
  const auto weight = static_cast<float>(rank - std::floor(rank));
  KeyCounts counts;
  uint32_t start = 0, bin = 0;
  int64_t below = 0;  // keys under `start`
  int high = kKeyBits;
  for (const int low : {20, 10, 0}) {
    std::memset(counts.bins, 0, sizeof counts.bins);
    counts.above = counts.beyond = UINT32_MAX;
    sample.each_piece(
        [&](const float* const* y, int64_t count) { kernels().count_keys(y[0], count, start, high, low, counts); });
    if (counts.beyond <= kKeyMask) return NAN;
    counts.above += start + (1u << high);
    for (bin = 0; bin + 1 < kBins && below + counts.bins[bin] <= lower; ++bin) below += counts.bins[bin];
    start += bin << low;
    high = low;
  }
  uint32_t upper = start;
  if (weight > 0.0f && lower + 1 >= below + counts.bins[bin]) {
    uint32_t next = bin + 1;
    while (next < kBins && counts.bins[next] == 0) ++next;
    upper = next == kBins ? counts.above : start + (next - bin);
  }
  return lerp(value_of(start), value_of(upper), weight);
}

// A fixed tree over the lanes.
double sum(const double* lanes) {
  double halves[kMomentLanes];
  std::copy(lanes, lanes + kMomentLanes, halves);
  for (int width = kMomentLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) halves[l] += halves[l + width];
  }
  return halves[0];
}

// std(y_1) / std(y_0), unbiased: means first, then squares about them, in double.
double ratio_of_deviations(Combinations& sample, int64_t numel) {
  double means[2] = {0.0, 0.0};
  Moments moments[2] = {};
  const auto pass = [&] {
    std::fill(moments, moments + 2, Moments{});
    sample.each_piece([&](const float* const* y, int64_t count) {
      for (int k = 0; k < 2; ++k) kernels().add_moments(y[k], count, means[k], moments[k]);
    });
  };
  pass();
  for (int k = 0; k < 2; ++k) means[k] = sum(moments[k].first) / static_cast<double>(numel);
  pass();
  const auto deviation = [&](int k) { return std::sqrt(sum(moments[k].second) / static_cast<double>(numel - 1)); };
  return deviation(1) / deviation(0);
}

void reduce(const StepProgram& program, int64_t numel, float* adjust) {
  Combinations sample(program, numel);
  const float low = program.output[0].low, high = program.output[0].high;
  if (program.kind == kThreshold) {
    float s = quantile(sample, numel, low);  // NaN fails both comparisons and stays
    s = s < 1.0f ? 1.0f : s;
    s = s > high ? high : s;
    adjust[0] = -s, adjust[1] = s, adjust[2] = 1.0f / s;
  } else {
    const double phi = low;
    adjust[0] = -INFINITY, adjust[1] = INFINITY;
    adjust[2] = static_cast<float>(phi * ratio_of_deviations(sample, numel) + (1.0 - phi));
  }
}

}  // namespace

void sample_adjust(const SolverStepArgs& args, float* adjust) {
  const std::vector<StepProgram> programs = decode_rows(args, "sample_adjust", true);
  if (args.numel > kMaxElements) fail("sample_adjust: ", args.numel, " elements a sample; at most ", kMaxElements);
  if (args.numel == 0) return;
  const int threads = threads_for(kPasses * work_of(programs, args.numel), args.threads);
  parallel_for(threads, args.batch, [&](int64_t b) {
    const FloatMode mode;
    reduce(programs[static_cast<size_t>(b)], args.numel, adjust + 3 * b);
  });
}

}  // namespace vivace
