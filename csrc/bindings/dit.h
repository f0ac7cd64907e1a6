// The native DiT's runner as a Python class.
#pragma once

#include <pybind11/pybind11.h>

namespace vivace {

void bind_dit(pybind11::module_& module);

}  // namespace vivace
