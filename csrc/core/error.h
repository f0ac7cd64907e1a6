// Errors of the caller: `fail(where, what, needed)` throws; the bindings turn it into ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace vivace {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

}  // namespace vivace
