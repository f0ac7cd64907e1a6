#include "bindings/tokens.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <vector>

#include "bindings/rows.h"
#include "core/error.h"
#include "ops/scatter_tokens.h"
#include "ops/select_tokens.h"

namespace py = pybind11;

namespace vivace {
namespace {

using Address = uintptr_t;
using Ints = std::vector<int64_t>;
using Sizes = std::array<int64_t, 3>;
// Address of ids [pictures, tokens], pictures, tokens of a picture.
using IdNumbers = std::array<int64_t, 3>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

TokenIds token_ids(const IdNumbers& n) { return {pointer<int32_t>(static_cast<Address>(n[0])), n[1], n[2]}; }

void py_gather_tokens(const IdNumbers& ids, const RowTensor& x, const RowTensor& out, const RowTensor& scale,
                      const RowTensor& shift, const RowTensor& weight, const RowTensor& bias, const RowTensor& normed,
                      const Sizes& sizes, bool centred, double eps, int64_t threads) {
  const py::gil_scoped_release unlocked;
  const RowShape shape{sizes[0], sizes[1], sizes[2]};
  gather_tokens({token_ids(ids), x, out, scale, shift, weight, bias, normed, shape, centred, eps}, threads);
}

// lanes: which part of full each row writes; parts: how many it has.
void py_scatter_tokens(const IdNumbers& ids, const RowTensor& full, int64_t parts, const std::optional<Ints>& lanes,
                       const RowTensor& fresh, const RowTensor& second, int64_t first, const RowTensor& hidden,
                       const RowTensor& gate, const Sizes& sizes, int64_t threads) {
  const py::gil_scoped_release unlocked;
  const char* op = "scatter_tokens";
  const RowShape shape{sizes[0], sizes[1], sizes[2]};
  std::vector<void*> at;
  for (int64_t r = 0; r < (has_rows(op, shape) ? shape.batch : 0); ++r) {
    if (lanes && static_cast<int64_t>(lanes->size()) != shape.batch)
      fail(op, ": ", lanes->size(), " lanes for a batch of ", shape.batch);
    const int64_t lane = lanes ? (*lanes)[static_cast<size_t>(r)] : r;
    if (lane < 0 || lane >= parts) fail(op, ": lane ", lane, " of ", parts);
    const int64_t offset = lane * full.sample_stride * dtype_size(full.dtype);
    at.push_back(full.data == nullptr ? nullptr : static_cast<char*>(full.data) + offset);
  }
  if (lanes) {
    for (size_t i = 0; i < at.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        if ((*lanes)[i] == (*lanes)[j]) fail(op, ": lane ", (*lanes)[i], " is given twice");
      }
    }
  }
  scatter_tokens({token_ids(ids), full, at.data(), fresh, second, first, hidden, gate, shape}, threads);
}

// planes: (address, elements between samples) of each; grid, patch: of every axis; sizes: batch, tokens, keep.
void py_select_tokens(const std::vector<std::array<int64_t, 2>>& planes, int64_t dtype, Address weights,
                      int64_t channels, const Ints& grid, const Ints& patch, bool deviation, Address scores,
                      Address ages, Address ids, const Sizes& sizes, int64_t lowest, Address factors,
                      int64_t factor_count, int64_t bound, int64_t least, int64_t threads) {
  const py::gil_scoped_release unlocked;
  if (grid.size() != patch.size())
    fail("select_tokens: ", grid.size(), " axes of tokens, ", patch.size(), " of pixels");
  if (dtype != static_cast<int32_t>(dtype)) fail("select_tokens: there are no planes of dtype ", dtype);
  std::vector<const void*> addresses;
  Ints strides;
  for (const auto& [address, stride] : planes) {
    addresses.push_back(pointer<void>(static_cast<Address>(address)));
    strides.push_back(stride);
  }
  SelectTokensArgs args{};
  args.planes = addresses.data(), args.plane_strides = strides.data();
  args.plane_count = static_cast<int64_t>(planes.size());
  args.dtype = static_cast<Dtype>(dtype);
  args.weights = pointer<float>(weights);
  args.channels = channels;
  args.grid = grid.data(), args.patch = patch.data();
  args.axes = static_cast<int64_t>(grid.size());
  args.metric = deviation ? TokenMetric::kDeviation : TokenMetric::kNorm;
  args.scores = pointer<float>(scores);
  args.ages = pointer<int32_t>(ages), args.ids = pointer<int32_t>(ids);
  args.batch = sizes[0], args.tokens = sizes[1], args.keep = sizes[2];
  args.lowest = lowest;
  args.factors = pointer<float>(factors), args.factor_count = factor_count;
  args.bound = bound, args.least = least;
  select_tokens(args, threads);
}

}  // namespace

void bind_tokens(py::module_& module) {
  // Positional: names would cost more than the rest of a call.
  module.def("gather_tokens", &py_gather_tokens);
  module.def("scatter_tokens", &py_scatter_tokens);
  module.def("select_tokens", &py_select_tokens);
}

}  // namespace vivace
