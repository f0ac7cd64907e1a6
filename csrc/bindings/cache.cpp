#include "bindings/cache.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings/rows.h"
#include "core/error.h"
#include "ops/cache_apply.h"
#include "ops/cache_update.h"

namespace py = pybind11;

namespace vivace {
namespace {

using Address = uintptr_t;
// Address, 0 float32 | 1 bfloat16 | 2 float16 | 3 int8 | 4 float8, lanes, planes of each, address of the scales or 0.
using PlaneNumbers = std::array<int64_t, 5>;
using Lanes = std::vector<int64_t>;
using Sizes = std::array<int64_t, 3>;
using Ids = std::array<int64_t, 3>;  // address, 0: none; samples; tokens that are kept

// The planes of each row of a call.
struct Planes {
  Planes(const char* op, const PlaneNumbers& numbers, const Lanes& lanes, const Ids& ids, const Sizes& sizes,
         int64_t planes) {
    const auto [address, code, count, most, scales] = numbers;
    const auto [batch, some_tokens, width] = sizes;
    if (!has_rows(op, {batch, some_tokens, width})) return;
    some = {reinterpret_cast<const int32_t*>(ids[0]), ids[1], ids[2]};
    const int64_t tokens = some.ids == nullptr ? some_tokens : some.tokens;
    if (code < 0 || code > static_cast<int64_t>(Dtype::kFloat8)) fail(op, ": nothing is kept in dtype ", code);
    if (static_cast<int64_t>(lanes.size()) != batch) fail(op, ": ", lanes.size(), " lanes for a batch of ", batch);
    if (planes > most) fail(op, ": ", planes, " planes of ", most);
    has_rows(op, {most, tokens, width});
    has_rows(op, {count, most * tokens, width});
    dtype = static_cast<Dtype>(code);
    for (const int64_t lane : lanes) {
      if (lane < 0 || lane >= count) fail(op, ": lane ", lane, " of ", count);
      const int64_t first = lane * most * tokens;
      rows.push_back({address == 0 ? nullptr : reinterpret_cast<char*>(address) + first * width * dtype_size(dtype),
                      scales == 0 ? nullptr : reinterpret_cast<float*>(scales) + first});
    }
  }

  KeptRows kept() const { return {rows.data(), dtype, some}; }

  std::vector<KeptRow> rows;
  Dtype dtype = Dtype::kFloat32;
  TokenIds some{};
};

void py_cache_update(const PlaneNumbers& kept, const Lanes& lanes, const RowTensor& fresh, const RowTensor& base,
                     int64_t made, const RowTensor& hidden, const RowTensor& gate, const RowTensor& out, const Ids& ids,
                     const Sizes& sizes, int64_t threads) {
  if (made < 0 || made >= kept[3]) fail("cache_update: ", made, " differences of ", kept[3], " planes");
  const py::gil_scoped_release unlocked;
  const Planes planes("cache_update", kept, lanes, ids, sizes, made + 1);
  for (size_t i = 0; i < lanes.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (lanes[i] == lanes[j]) fail("cache_update: lane ", lanes[i], " is given twice");
    }
  }
  cache_update({fresh, base, planes.kept(), made, hidden, gate, out, {sizes[0], sizes[1], sizes[2]}}, threads);
}

void py_cache_apply(const PlaneNumbers& kept, const Lanes& lanes, Address weights, int64_t terms,
                    const RowTensor& hidden, const RowTensor& gate, const RowTensor& out, const Ids& ids,
                    const Sizes& sizes, int64_t threads) {
  const py::gil_scoped_release unlocked;
  const Planes planes("cache_apply", kept, lanes, ids, sizes, terms);
  cache_apply({planes.kept(),
               reinterpret_cast<const float*>(weights),
               terms,
               hidden,
               gate,
               out,
               {sizes[0], sizes[1], sizes[2]}},
              threads);
}

}  // namespace

void bind_cache(py::module_& module) {
  // Positional: names would cost more than the rest of a call.
  module.def("cache_update", &py_cache_update);
  module.def("cache_apply", &py_cache_apply);
}

}  // namespace vivace
