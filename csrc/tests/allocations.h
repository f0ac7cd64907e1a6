// How often this program has asked for memory, from any thread: allocations.cpp replaces operator new.
#pragma once

#include <cstdint>

namespace vivace::test {

int64_t allocations();

}  // namespace vivace::test
