// Tensors over rows as Python hands them over.
#pragma once

#include <pybind11/pybind11.h>

#include "ops/rows.h"

// Rows: (address, 0 float32 | 1 bfloat16, sample stride, token stride), or None where they are absent. Read by hand:
// the ops over rows take many and last microseconds.
template <>
struct pybind11::detail::type_caster<vivace::RowTensor> {
  PYBIND11_TYPE_CASTER(vivace::RowTensor, const_name("tuple[int, int, int, int] | None"));

  bool load(handle source, bool) {
    value = {};
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    int64_t numbers[4];
    for (int i = 0; i < 4; ++i) {
      numbers[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
      if (numbers[i] == -1 && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        return false;
      }
    }
    if (numbers[1] != 0 && numbers[1] != 1) return false;
    value = {reinterpret_cast<void*>(numbers[0]), static_cast<vivace::Dtype>(numbers[1]), numbers[2], numbers[3]};
    return true;
  }
};
