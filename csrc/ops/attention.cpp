#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "core/error.h"
#include "core/float_mode.h"
#include "core/thread_pool.h"
#include "simd/cpu.h"

namespace vivace {
namespace {

constexpr int64_t kStrip = 48;                        // rows of scores at a time: 48 KiB of 256 keys
constexpr int64_t kKeyElements = int64_t{1} << 15;    // of a block of keys: with its values half a second-level cache
constexpr int64_t kQueryElements = int64_t{1} << 16;  // of the sums that wait for the next block of keys
constexpr int64_t kLeastQueries = 2 * kStrip;  // of a task: packing keys and values costs as much as some 12 queries
constexpr int64_t kTasks = 16;                 // wanted, for that many threads

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int64_t share(int64_t x, int64_t parts, int64_t to) { return round_up((x + parts - 1) / parts, to); }

int64_t most_keys(const AttentionBlocks& b) { return std::max<int64_t>(64, kKeyElements / b.columns / 64 * 64); }

// Where everything lies in the scratch of a task. several: sums wait for the next block of keys.
void lay_out(AttentionBlocks& b, bool wide, bool several) {
  b.end = 0;
  const auto place = [&](int64_t floats) {
    const int64_t at = b.end;
    b.end += round_up(floats, 16);
    return at;
  };
  b.key_at = place(b.padded * b.words);
  b.value_at = place((wide ? b.padded : b.padded / 2) * b.columns);
  b.score_at = place(b.strip * b.padded);
  b.sum_at = place((several ? b.queries : b.strip) * b.columns);
  b.state_at = place(2 * b.queries);
}

int64_t pieces_of(const AttentionArgs& args, const AttentionBlocks& b) {
  return (args.queries + b.queries - 1) / b.queries;
}

void check_heads(const char* name, const HeadTensor& tensor, int64_t tokens) {
  if (tensor.data == nullptr && tokens > 0) fail("attention: ", name, " has no memory");
}

// Keys or values, which may lie sample by sample.
void check_kept_heads(const char* name, const HeadTensor& tensor, const void* const* at, int64_t batch, int64_t keys) {
  if (at == nullptr) return check_heads(name, tensor, keys);
  for (int64_t b = 0; b < batch; ++b) {
    if (at[b] == nullptr && keys > 0) fail("attention: ", name, " of sample ", b, " has no memory");
  }
}

// A thread's scratch, kept for its next task.
float* own_scratch(int64_t floats) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset(new float[static_cast<size_t>(floats)]);
    size = floats;
  }
  return memory.get();
}

}  // namespace

AttentionBlocks attention_blocks(const AttentionArgs& args) {
  AttentionBlocks b{};
  const bool wide = args.dtype == Dtype::kFloat32;
  b.columns = round_up(std::max<int64_t>(1, args.width), 16);
  b.words = wide ? args.width : (args.width + 1) / 2;
  const int64_t most = most_keys(b), key_blocks = std::max<int64_t>(1, (args.keys + most - 1) / most);
  b.keys = share(args.keys, key_blocks, 64);
  b.padded = std::min(b.keys, round_up(args.keys, 32));
  const int64_t heads = std::max<int64_t>(1, args.batch * args.heads);
  int64_t pieces = std::min((kTasks + heads - 1) / heads, std::max<int64_t>(1, args.queries / kLeastQueries));
  if (key_blocks > 1) pieces = std::max(pieces, (args.queries * b.columns + kQueryElements - 1) / kQueryElements);
  b.queries = share(args.queries, pieces, kStrip);
  b.strip = kStrip;
  lay_out(b, wide, key_blocks > 1);
  return b;
}

int64_t attention_tasks(const AttentionArgs& args) {
  if (args.batch * args.heads * args.queries * args.width == 0) return 0;
  return args.batch * args.heads * pieces_of(args, attention_blocks(args));
}

int64_t attention_scratch(const AttentionArgs& args) { return attention_blocks(args).end + 15; }

int64_t attention_most_scratch(const AttentionArgs& args) {
  AttentionBlocks b = attention_blocks(args);
  b.padded = std::min(most_keys(b), round_up(args.keys, 32));
  const bool several = args.keys > most_keys(b);
  b.queries = round_up(args.queries, kStrip);
  if (several) b.queries = std::min(b.queries, round_up(kQueryElements / b.columns, kStrip) + kStrip);
  lay_out(b, args.dtype == Dtype::kFloat32, several);
  return b.end + 15;
}

void attention_task(const AttentionArgs& args, int64_t task, float* scratch) {
  const FloatMode mode;
  const AttentionBlocks b = attention_blocks(args);
  const int64_t pieces = pieces_of(args, b), head = task / pieces, begin = task % pieces * b.queries;
  auto* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  kernels().attention_rows(args, b, head / args.heads, head % args.heads, begin,
                           std::min(begin + b.queries, args.queries), aligned);
}

void check_attention(const AttentionArgs& args) {
  const auto& [query, key, value, out, dtype, batch, heads, queries, keys, width, scale, key_at, value_at] = args;
  if (batch < 0 || heads < 0 || queries < 0 || keys < 0 || width < 0) fail("attention: a size is negative");
  const double elements = static_cast<double>(batch) * static_cast<double>(heads) * static_cast<double>(width);
  if (elements * static_cast<double>(std::max(queries, keys)) > 0x1p60) fail("attention: the heads fit no memory");
  if (dtype != Dtype::kFloat32 && dtype != Dtype::kBfloat16)
    fail("attention: there are no heads of dtype ", static_cast<int>(dtype), "; use float32 or bfloat16");
  if (!(scale > 0.0f) || !std::isfinite(scale)) fail("attention: scale is ", scale, "; needs a finite number above 0");
  if (elements == 0.0) return;
  check_heads("query", query, queries);
  check_kept_heads("key", key, key_at, batch, keys);
  check_kept_heads("value", value, value_at, batch, keys);
  check_heads("out", out, queries);
}

void attention(const AttentionArgs& args, int64_t threads) {
  check_attention(args);
  // Time of a score in bytes moved in cache: both products at 200 | 400 GFLOP/s a core, and the softmax.
  const double each = static_cast<double>(args.width * (args.dtype == Dtype::kFloat32 ? 2 : 1) + 10);
  const double scores = static_cast<double>(args.batch * args.heads * args.queries) * static_cast<double>(args.keys);
  const auto bytes = static_cast<int64_t>(std::min(scores * each, 0x1p60));
  const int64_t floats = attention_scratch(args);
  parallel_for(threads_for(bytes, threads), attention_tasks(args),
               [&](int64_t task) { attention_task(args, task, own_scratch(floats)); });
}

}  // namespace vivace
