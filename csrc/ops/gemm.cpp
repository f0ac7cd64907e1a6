#include "ops/gemm.h"

#include <algorithm>

#include "core/error.h"
#include "core/float_mode.h"
#include "core/thread_pool.h"
#include "simd/cpu.h"

namespace vivace {
namespace {

constexpr int64_t kBytesPerElement = 16;  // what packing one costs, as bytes moved in cache

int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// One panel, `group` neighbours of a column side by side. Eight lines of the panel are written at a time.
template <typename T, int64_t group>
void pack_panel(T* panel, const T* src, int64_t columns, int64_t depth, int64_t row_stride) {
  constexpr int64_t kStep = 8 * group;
  const int64_t padded = (depth + group - 1) / group * group;
  for (int64_t begin = 0; begin < padded; begin += kStep) {
    const int64_t end = std::min(begin + kStep, padded);
    for (int64_t n = 0; n < kPanel; ++n) {
      for (int64_t k = begin; k < end; ++k) {
        panel[(k / group * kPanel + n) * group + k % group] = n < columns && k < depth ? src[n * row_stride + k] : T{};
      }
    }
  }
}

// The sums of the columns of a packed panel.
void sum_columns(int32_t* sums, const int8_t* panel, int64_t padded) {
  for (int64_t n = 0; n < kPanel; ++n) sums[n] = 0;
  for (int64_t i = 0; i < padded * kPanel; ++i) sums[i / 4 % kPanel] += panel[i];
}

template <typename T, int64_t group>
void pack(void* dst, const void* src, int64_t columns, int64_t depth, int64_t row_stride, int64_t threads) {
  const int64_t size = (depth + group - 1) / group * group * kPanel;
  const int workers = threads_for(kBytesPerElement * size * panels_of(columns), threads);
  parallel_for(workers, panels_of(columns), [&](int64_t panel) {
    const T* from = static_cast<const T*>(src) + panel * kPanel * row_stride;
    T* to = static_cast<T*>(dst) + panel * size;
    pack_panel<T, group>(to, from, columns - panel * kPanel, depth, row_stride);
    if constexpr (sizeof(T) == 1) {
      auto* sums = reinterpret_cast<int32_t*>(static_cast<T*>(dst) + panels_of(columns) * size);
      sum_columns(sums + panel * kPanel, to, size / kPanel);
    }
  });
}

}  // namespace

int64_t packed_bytes(int64_t columns, int64_t depth, Dtype dtype) {
  if (columns < 0 || depth < 0) fail("pack_matrix: a size of [", columns, ", ", depth, "] is negative");
  if (static_cast<double>(columns) * static_cast<double>(depth) > 0x1p50)
    fail("pack_matrix: [", columns, ", ", depth, "] fits no memory");
  if (dtype == Dtype::kFloat32) return panels_of(columns) * kPanel * depth * 4;
  if (dtype == Dtype::kBfloat16) return panels_of(columns) * kPanel * ((depth + 1) / 2) * 4;
  if (dtype == Dtype::kInt8) return panels_of(columns) * kPanel * ((depth + 3) / 4 + 1) * 4;
  fail("pack_matrix: dtype ", static_cast<int32_t>(dtype), " is none of float32, bfloat16 and int8");
}

void pack_matrix(void* dst, const void* src, int64_t columns, int64_t depth, int64_t row_stride, Dtype dtype,
                 int64_t threads) {
  if (packed_bytes(columns, depth, dtype) == 0) return;
  if (dst == nullptr || src == nullptr) fail("pack_matrix: ", dst == nullptr ? "dst" : "src", " has no memory");
  if (dtype == Dtype::kFloat32) return pack<float, 1>(dst, src, columns, depth, row_stride, threads);
  if (dtype == Dtype::kBfloat16) return pack<uint16_t, 2>(dst, src, columns, depth, row_stride, threads);
  pack<int8_t, 4>(dst, src, columns, depth, row_stride, threads);
}

int64_t run_products(Dtype dtype, int64_t steps, int64_t threads) {
  if (dtype != Dtype::kFloat32 && dtype != Dtype::kBfloat16 && dtype != Dtype::kInt8)
    fail("run_products: dtype ", static_cast<int32_t>(dtype), " is none of float32, bfloat16 and int8");
  if (steps < 0 || steps > int64_t{1} << 30) fail("run_products: ", steps, " steps; needs 0 to 2^30");
  const int workers = threads_for(steps << 24, threads);
  parallel_for(workers, steps * workers, [&](int64_t) {
    const FloatMode mode;
    kernels().products(dtype);
  });
  return steps * workers * kProductOperations;
}

}  // namespace vivace
