// A small pool of sleeping threads: no spinning, so it disturbs neither torch's threads nor other processes.
#pragma once

#include <cstdint>

namespace vivace {

// Calls task(context, i) for every i in [0, count) on at most `threads` threads, the caller among them; returns when
// all are done. Tasks are handed out one by one, so a slow or busy core takes fewer. They must not throw.
// A second caller at the same time does its tasks alone. A forked child starts with an empty pool.
void parallel_for(int threads, int64_t count, void (*task)(const void*, int64_t), const void* context);

template <typename Body>
void parallel_for(int threads, int64_t count, const Body& body) {
  parallel_for(threads, count, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, &body);
}

// Threads worth using for a pass that costs as much time as moving `bytes` in cache: one below the measured threshold,
// else up to `limit` and up to what the process may use.
int threads_for(int64_t bytes, int64_t limit);

}  // namespace vivace
