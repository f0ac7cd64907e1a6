#include "ops/copy.h"

#include <string.h>

#include <algorithm>

#include "core/error.h"
#include "core/thread_pool.h"
#include "simd/cpu.h"

namespace vivace {
namespace {

constexpr int64_t kChunk = int64_t{1} << 20;

template <typename Copy>
void copy_chunks(void* dst, const void* src, int64_t bytes, int64_t threads, const Copy& copy) {
  if (bytes < 0) fail("copy: ", bytes, " bytes");
  if (bytes == 0) return;
  if (dst == nullptr || src == nullptr) fail("copy: no memory given");
  parallel_for(threads_for(2 * bytes, threads), (bytes + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t at = chunk * kChunk;
    copy(static_cast<char*>(dst) + at, static_cast<const char*>(src) + at, std::min(kChunk, bytes - at));
  });
}

}  // namespace

void copy_memcpy(void* dst, const void* src, int64_t bytes, int64_t threads) {
  copy_chunks(dst, src, bytes, threads, [](void* to, const void* from, int64_t n) { memcpy(to, from, n); });
}

void copy_stream(void* dst, const void* src, int64_t bytes, int64_t threads) {
  if (reinterpret_cast<uintptr_t>(dst) % 64 != 0) fail("copy_stream: dst is not aligned to 64 bytes");
  if (reinterpret_cast<uintptr_t>(src) % 4 != 0) fail("copy_stream: src is not aligned to 4 bytes");
  const Kernels& table = kernels();
  copy_chunks(dst, src, bytes, threads, [&](void* to, const void* from, int64_t n) { table.copy_stream(to, from, n); });
}

}  // namespace vivace
