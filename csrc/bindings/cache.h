// What rows of a plan keep and read again: the ops over kept planes.
#pragma once

#include <pybind11/pybind11.h>

namespace vivace {

void bind_cache(pybind11::module_& module);

}  // namespace vivace
