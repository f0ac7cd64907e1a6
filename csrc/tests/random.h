// A small generator for tests: the same numbers on every platform.
#pragma once

#include <cstdint>
#include <new>
#include <vector>

#include "tests/oracle.h"

namespace vivace::test {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}

  uint32_t word() {  // splitmix64, upper half
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>((z ^ z >> 31) >> 32);
  }
  int below(int64_t count) { return static_cast<int>(word() % static_cast<uint64_t>(count)); }
  bool chance(int percent) { return below(100) < percent; }

  // Mostly of order one; now and then a zero, a subnormal, something huge, an infinity or a NaN.
  float value() {
    static const float odd[] = {0.0f, -0.0f, 1e-41f, -3e-39f, 6e-8f, 65519.9f, 65520.0f, 3e38f, -3.4e38f, 2049.0f};
    if (chance(1)) return from_bits(word());
    if (chance(3)) return odd[below(10)];
    return static_cast<float>(static_cast<int32_t>(word())) * 0x1p-30f;
  }

  // Bits of a half type: any but NaN with a rare infinity, so that sums stay interesting.
  uint16_t half(Dtype dtype) {
    const auto h = static_cast<uint16_t>(word());
    if (chance(2)) return h;
    return dtype == Dtype::kBfloat16 ? (h & 0x80ffu) | 0x3f00u : (h & 0x87ffu) | 0x3800u;
  }

 private:
  uint64_t state_;
};

// `count` elements that begin `offset` elements after a 64-byte boundary and end where the allocation ends, so that the
// address sanitizer sees one element too many.
template <typename T>
class Buffer {
 public:
  Buffer(int64_t count, int64_t offset, T fill = T{})
      : memory_(static_cast<size_t>(count + offset), fill), offset_(offset) {}
  T* data() { return memory_.data() + offset_; }
  const T* data() const { return memory_.data() + offset_; }
  int64_t size() const { return static_cast<int64_t>(memory_.size()) - offset_; }

 private:
  template <typename U>
  struct Aligned {  // exact 64-byte aligned blocks
    using value_type = U;
    Aligned() = default;
    template <typename V>
    explicit Aligned(const Aligned<V>&) {}
    U* allocate(size_t n) { return static_cast<U*>(::operator new(n * sizeof(U), std::align_val_t{64})); }
    void deallocate(U* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
  };
  std::vector<T, Aligned<T>> memory_;
  int64_t offset_;
};

}  // namespace vivace::test
