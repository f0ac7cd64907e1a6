// A small pool of sleeping threads: between calls it disturbs neither torch's threads nor other processes.
#pragma once

#include <cstdint>

namespace vivace {

// Most threads of a call, the caller among them.
constexpr int kMostThreads = 64;

// Calls work(context, member) as member 0 on this thread and as members 1 .. members - 1 on threads of the pool, each
// woken once; a number goes to the same thread every time. Who has not woken when member 0 returns stays out, so `work`
// must be right for any of them; it must not throw. Returns when all who came have left. A second caller at the same
// time is alone. A forked child starts with an empty pool. Where memory has several nodes, see core/placement.h.
void on_threads(int members, void (*work)(void* context, int member), void* context);

// Calls task(context, i) for every i in [0, count) on at most `threads` threads, the caller among them; returns when
// all are done. Tasks are handed out one by one, so a slow or busy core takes fewer. They must not throw.
void parallel_for(int threads, int64_t count, void (*task)(const void*, int64_t), const void* context);

template <typename Body>
void parallel_for(int threads, int64_t count, const Body& body) {
  parallel_for(threads, count, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, &body);
}

// Threads worth using for a pass that costs as much time as moving `bytes` in cache: one below the measured threshold,
// else up to `limit` and up to what the process may use.
int threads_for(int64_t bytes, int64_t limit);

}  // namespace vivace
