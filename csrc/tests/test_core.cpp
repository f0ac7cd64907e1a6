// The thread pool, the copies and the machine's facts.
#include <atomic>
#include <thread>

#include "core/machine.h"
#include "core/thread_pool.h"
#include "ops/copy.h"
#include "simd/cpu.h"
#include "tests/harness.h"
#include "tests/random.h"

namespace vivace::test {
namespace {

// Every task of `count` is done once, for ever so many threads.
bool each_once(int threads, int64_t count) {
  std::vector<std::atomic<int>> done(static_cast<size_t>(count));
  parallel_for(threads, count, [&](int64_t i) { done[static_cast<size_t>(i)].fetch_add(1); });
  bool once = true;
  for (const auto& times : done) once = once && times == 1;
  return once;
}

VV_TEST(every_task_is_done_once) {
  for (const int threads : {-1, 0, 1, 2, 3, 64, 1000}) {
    for (const int64_t count : {0, 1, 2, 3, 63, 64, 65, 4097}) CHECK(each_once(threads, count));
  }
}

VV_TEST(tasks_are_done_once_from_many_callers_and_from_inside) {
  std::vector<std::thread> callers;
  std::atomic<int> right{0};
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 200; ++repeat) right += each_once(2, 100);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(right == 800);
  std::atomic<int> inner{0};
  parallel_for(2, 8, [&](int64_t) { parallel_for(2, 8, [&](int64_t) { ++inner; }); });
  CHECK(inner == 64);
}

VV_TEST(copies_are_exact_at_every_size_and_alignment) {
  Random random(4);
  for (const int64_t bytes : {0, 1, 3, 4, 15, 16, 63, 64, 65, 255, 256, 257, 4097, (1 << 20) + 3, 9 << 20}) {
    for (const int64_t offset : {0, 1, 4, 60}) {
      Buffer<char> from(bytes, offset), plain(bytes, 63 - offset), streamed(bytes, 0, 0);
      for (int64_t i = 0; i < bytes; i += bytes > 5000 ? 101 : 1) from.data()[i] = static_cast<char>(random.word());
      copy_memcpy(plain.data(), from.data(), bytes, 2);
      CHECK(std::equal(from.data(), from.data() + bytes, plain.data()));
      if (offset % 4 != 0) continue;
      copy_stream(streamed.data(), from.data(), bytes, 2);
      CHECK(std::equal(from.data(), from.data() + bytes, streamed.data()));
    }
  }
}

VV_TEST(bad_copies_are_refused) {
  Buffer<char> a(256, 0), b(256, 0);
  CHECK(!refusal([&] { copy_memcpy(a.data(), b.data(), -1, 1); }).empty());
  CHECK(!refusal([&] { copy_memcpy(nullptr, b.data(), 1, 1); }).empty());
  CHECK(!refusal([&] { copy_stream(a.data() + 4, b.data(), 64, 1); }).empty());
  CHECK(!refusal([&] { copy_stream(a.data(), b.data() + 1, 64, 1); }).empty());
  CHECK(!refusal([&] { copy_stream(a.data(), nullptr, 64, 1); }).empty());
}

VV_TEST(the_machine_is_known) {
  CHECK(usable_processors() >= 1 && last_level_cache_bytes() > 0);
  CHECK(available_isas().front() == "scalar");
  CHECK(threads_for(1, 8) == 1 && threads_for(int64_t{1} << 40, 1) == 1 && threads_for(int64_t{1} << 40, 8) >= 1);
  CHECK(threads_for(int64_t{1} << 40, -3) == 1);
}

}  // namespace
}  // namespace vivace::test
