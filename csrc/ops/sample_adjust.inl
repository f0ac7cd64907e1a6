// What a piece of a sample adds to a reduction.

namespace vivace::VV_NAMESPACE {

// Counts the keys in [start, start + 2^high) by their bits from `low` on. An unsigned difference below 2^31 means "not
// less", so one minimum finds the next key above the range, and one the NaNs. A block without a key in range, which
// from the second round on nearly every block is, takes no more than that.
static void count_keys(const float* y, int64_t count, uint32_t start, int high, int low, KeyCounts& counts) {
  const uint32_t width = 1u << high, end = start + width;
  uint32_t above = counts.above, beyond = counts.beyond;
  const auto count_one = [&](const float* p) {
    uint32_t key;
    memcpy(&key, p, 4);
    key &= kKeyMask;
    if (key - start < width) ++counts.bins[(key - start) >> low];
    return key;
  };
  int64_t i = 0;
  U next = set1u(above), nan = set1u(beyond);
  for (; i + kBlock <= count; i += kBlock) {
    U inside = set1u(UINT32_MAX);
    for (int u = 0; u < kVectors; ++u) {
      const U key = bits(load(y + i + u * kLanes)) & set1u(kKeyMask);
      inside = min(inside, key - set1u(start));
      next = min(next, key - set1u(end));
      nan = min(nan, key - set1u(kInfinityKey + 1));
    }
    if (any_below(inside, width)) {
      for (int l = 0; l < kBlock; ++l) count_one(y + i + l);
    }
  }
  float lanes[2][kLanes];
  store(lanes[0], from_bits(next));
  store(lanes[1], from_bits(nan));
  for (int l = 0; l < kLanes; ++l) {
    uint32_t offset[2];
    memcpy(&offset[0], &lanes[0][l], 4);
    memcpy(&offset[1], &lanes[1][l], 4);
    above = offset[0] < above ? offset[0] : above;
    beyond = offset[1] < beyond ? offset[1] : beyond;
  }
  for (; i < count; ++i) {
    const uint32_t key = count_one(y + i);
    above = key - end < above ? key - end : above;
    beyond = key - (kInfinityKey + 1) < beyond ? key - (kInfinityKey + 1) : beyond;
  }
  counts.above = above;
  counts.beyond = beyond;
}

// y is the start of a piece whose offset in the sample is a multiple of kMomentLanes.
static void add_moments(const float* y, int64_t count, double mean, Moments& moments) {
  double first[kMomentLanes], second[kMomentLanes];
  memcpy(first, moments.first, sizeof first);
  memcpy(second, moments.second, sizeof second);
  int64_t i = 0;
  for (; i + kMomentLanes <= count; i += kMomentLanes) {
#pragma GCC unroll 16
    for (int l = 0; l < kMomentLanes; ++l) {
      const double d = static_cast<double>(y[i + l]) - mean;
      first[l] += d;
      second[l] += d * d;
    }
  }
  for (int l = 0; i < count; ++i, ++l) {
    const double d = static_cast<double>(y[i]) - mean;
    first[l] += d;
    second[l] += d * d;
  }
  memcpy(moments.first, first, sizeof first);
  memcpy(moments.second, second, sizeof second);
}

}  // namespace vivace::VV_NAMESPACE
