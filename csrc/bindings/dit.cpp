#include "bindings/dit.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/error.h"
#include "runtime/dit.h"

namespace py = pybind11;

namespace vivace {
namespace {

using Address = uintptr_t;
// Packed weight, its columns, depth and dtype; then 0 where there is none: bias, and of int8 scale and smooth.
using Linear = std::tuple<Address, int64_t, int64_t, std::string, Address, Address, Address>;
// qkv, out, up, down; dtypes of activations in attention and MLP.
using Block = std::tuple<Linear, Linear, Linear, Linear, std::string, std::string>;
using Latents = std::tuple<Address, int64_t, std::string>;  // address, elements between lanes, dtype
using Clock = std::array<int64_t, static_cast<size_t>(kDitStages)>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
std::vector<T*> pointers(const std::vector<Address>& addresses) {
  std::vector<T*> made;
  made.reserve(addresses.size());
  for (const Address address : addresses) made.push_back(pointer<T>(address));
  return made;
}

Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBfloat16;
  fail("Dit: dtype ", name, " has no kernel; use float32 or bfloat16");
}

Dtype parse_weight(const std::string& name) { return name == "int8" ? Dtype::kInt8 : parse_dtype(name); }

Activation parse_gelu(const std::string& name) {
  if (name == "none") return Activation::kGelu;
  if (name == "tanh") return Activation::kGeluTanh;
  fail("Dit: gelu is ", name, "; use none or tanh");
}

Dit make_dit(int64_t heads, int64_t patch, int64_t channels, int64_t out_channels, const std::string& gelu,
             const std::array<double, 3>& eps, const std::string& dtype, const Linear& patches,
             const std::vector<Block>& blocks, const Linear& final) {
  const DitSizes sizes{heads,  patch,  channels, out_channels,      parse_gelu(gelu),
                       eps[0], eps[1], eps[2],   parse_dtype(dtype)};
  const auto layer = [](const Linear& numbers) {
    const auto& [weight, columns, depth, kind, bias, scale, smooth] = numbers;
    const PackedMatrix matrix{pointer<void>(weight), columns, depth, parse_weight(kind)};
    return DitLinear{matrix, pointer<float>(bias), pointer<float>(scale), pointer<float>(smooth)};
  };
  DitWeights weights{layer(patches), {}, layer(final)};
  for (const auto& [qkv, out, up, down, attention, mlp] : blocks)
    weights.blocks.push_back(
        {{layer(qkv), layer(out), layer(up), layer(down)}, parse_dtype(attention), parse_dtype(mlp)});
  return Dit(sizes, std::move(weights));
}

// Nanoseconds by stage, if asked for, and the place of the first fault, -1 without one or unless asked for.
std::pair<std::optional<Clock>, int64_t> run_dit(const Dit& dit, const Latents& x, int64_t capacity,
                                                 const std::vector<int64_t>& lanes, const std::array<int64_t, 2>& size,
                                                 Address positions, const std::vector<Address>& modulations,
                                                 const std::vector<Address>& x_scales, const std::vector<Address>& outs,
                                                 Address arena, int64_t arena_bytes, int64_t threads, bool clocked,
                                                 bool checked) {
  const auto samples = static_cast<int64_t>(lanes.size()), branches = static_cast<int64_t>(outs.size());
  if (modulations.size() != lanes.size() * outs.size())
    fail("Dit: ", modulations.size(), " modulations for ", branches, " branches of ", samples, " samples");
  const std::vector<const float*> vectors = pointers<const float>(modulations);
  if (!x_scales.empty() && x_scales.size() != modulations.size())
    fail("Dit: ", x_scales.size(), " x_scales for ", modulations.size(), " rows");
  const std::vector<const float*> scales = pointers<const float>(x_scales);
  const std::vector<float*> results = pointers<float>(outs);
  const auto& [address, lane_stride, x_dtype] = x;
  Clock clock{};
  int64_t fault = -1;
  const DitCall call{pointer<void>(address),
                     parse_dtype(x_dtype),
                     lane_stride,
                     capacity,
                     lanes.data(),
                     samples,
                     branches,
                     size[0],
                     size[1],
                     pointer<float>(positions),
                     vectors.data(),
                     scales.empty() ? nullptr : scales.data(),
                     results.data(),
                     pointer<void>(arena),
                     arena_bytes,
                     threads,
                     clocked ? clock.data() : nullptr,
                     checked ? &fault : nullptr};
  {
    const py::gil_scoped_release unlocked;
    dit.run(call);
  }
  return {clocked ? std::optional<Clock>(clock) : std::nullopt, fault};
}

}  // namespace

void bind_dit(py::module_& module) {
  py::class_<Dit>(module, "Dit")
      .def(py::init(&make_dit), py::kw_only(), py::arg("heads"), py::arg("patch"), py::arg("channels"),
           py::arg("out_channels"), py::arg("gelu"), py::arg("eps"), py::arg("dtype"), py::arg("patches"),
           py::arg("blocks"), py::arg("final"))
      .def("arena_bytes", &Dit::arena_bytes, py::arg("rows"), py::arg("samples"), py::arg("tokens"), py::arg("threads"))
      .def("run", &run_dit, py::kw_only(), py::arg("x"), py::arg("capacity"), py::arg("lanes"), py::arg("size"),
           py::arg("positions"), py::arg("modulations"), py::arg("x_scales"), py::arg("outs"), py::arg("arena"),
           py::arg("arena_bytes"), py::arg("threads"), py::arg("clock") = false, py::arg("check") = false);
}

}  // namespace vivace
