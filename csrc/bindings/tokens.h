// Rows that compute some tokens of a picture: which, taken out of all, and put back.
#pragma once

#include <pybind11/pybind11.h>

namespace vivace {

void bind_tokens(pybind11::module_& module);

}  // namespace vivace
