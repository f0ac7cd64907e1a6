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
// action, cell, at, until, made, terms, dtype of the store; as in runtime/dit_uses.h.
using Use = std::tuple<std::string, std::string, int64_t, int64_t, int64_t, int64_t, std::string>;
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

Dtype parse_store(const std::string& name) {
  if (name == "float16") return Dtype::kFloat16;
  return name == "float8_e4m3fn" ? Dtype::kFloat8 : parse_weight(name);
}

DitAction parse_action(const std::string& name) {
  if (name == "open") return DitAction::kOpen;
  if (name == "keep") return DitAction::kKeep;
  if (name == "apply") return DitAction::kApply;
  if (name == "keys") return DitAction::kKeys;
  fail("Dit: action ", name, " is none of open, keep, apply, keys");
}

DitCell parse_cell(const std::string& name) {
  if (name == "attn" || name == "mlp") return DitCell::kHalf;
  if (name == "residual") return DitCell::kResidual;
  if (name == "block") return DitCell::kBlock;
  if (name == "kv") return DitCell::kHeads;
  fail("Dit: site ", name, " is none of attn, mlp, residual, block, kv");
}

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

// The uses of a row with the memory of its rows, which later rows of the same structure and samples share. Addresses of
// planes and of scales (0: none) lie use by use; so do the weights, which every row has its own of.
class Uses {
 public:
  Uses(const std::vector<Use>& uses, const std::vector<Address>& values, const std::vector<Address>& scales,
       int64_t rows)
      : rows_(rows) {
    if (rows < 0 || values.size() != uses.size() * static_cast<size_t>(rows) || scales.size() != values.size())
      fail("Dit: ", values.size(), " planes and ", scales.size(), " scales for ", uses.size(), " uses of ", rows,
           " rows");
    for (size_t i = 0; i < values.size(); ++i) kept_.push_back({pointer<void>(values[i]), pointer<float>(scales[i])});
    for (const auto& [action, cell, at, until, made, terms, store] : uses) {
      const DitAction does = parse_action(action);
      if (terms < 0 || terms > kMostTerms) fail("Dit: a use reads ", terms, " planes; the most is ", kMostTerms);
      const KeptRows held{kept_.data() + made_.size() * static_cast<size_t>(rows), parse_store(store)};
      made_.push_back({does, parse_cell(cell), at, until, made, terms, held, nullptr});
      read_ += does == DitAction::kApply ? terms * rows : 0;
    }
  }
  Uses(const Uses&) = delete;
  Uses& operator=(const Uses&) = delete;

  // The same with the weights of a row.
  std::vector<DitUse> with(const std::vector<float>& weights, size_t rows) const {
    if (rows_ != static_cast<int64_t>(rows)) fail("Dit: uses of ", rows_, " rows for ", rows);
    if (read_ != static_cast<int64_t>(weights.size())) fail("Dit: ", weights.size(), " weights; the uses read ", read_);
    std::vector<DitUse> uses = made_;
    const float* next = weights.data();
    for (DitUse& use : uses) {
      if (use.action != DitAction::kApply || use.terms == 0) continue;
      use.weights = next;
      next += use.terms * rows_;
    }
    return uses;
  }

 private:
  static constexpr int64_t kMostTerms = 1 << 10;
  int64_t rows_, read_ = 0;  // rows; weights of a call
  std::vector<KeptRow> kept_{};
  std::vector<DitUse> made_{};
};

// Nanoseconds by stage, if asked for, and the place of the first fault, -1 without one or unless asked for.
std::pair<std::optional<Clock>, int64_t> run_dit(const Dit& dit, const Latents& x, int64_t capacity,
                                                 const std::vector<int64_t>& lanes, const std::array<int64_t, 2>& size,
                                                 Address positions, const std::vector<Address>& modulations,
                                                 const std::vector<Address>& x_scales, const std::vector<Address>& outs,
                                                 Address arena, int64_t arena_bytes, int64_t threads, bool clocked,
                                                 bool checked, const Uses* uses, const std::vector<float>& weights,
                                                 const std::pair<Address, int64_t>& some, int64_t first,
                                                 const std::vector<Address>& from,
                                                 std::optional<std::tuple<int64_t, Address, Address>> look) {
  const auto samples = static_cast<int64_t>(lanes.size());
  const size_t rows = modulations.size();
  if (look.has_value() ? lanes.empty() || rows % lanes.size() != 0 : rows != lanes.size() * outs.size())
    fail("Dit: ", rows, " modulations for ", outs.size(), " branches of ", samples, " samples");
  const auto branches = static_cast<int64_t>(look.has_value() ? rows / lanes.size() : outs.size());
  const std::vector<const float*> vectors = pointers<const float>(modulations);
  if (!x_scales.empty() && x_scales.size() != rows) fail("Dit: ", x_scales.size(), " x_scales for ", rows, " rows");
  if (!from.empty() && from.size() != rows) fail("Dit: ", from.size(), " hidden states for ", rows, " rows");
  const std::vector<const float*> given = pointers<const float>(x_scales), starts = pointers<const float>(from);
  const std::vector<float*> results = pointers<float>(outs);
  const std::vector<DitUse> kept = uses == nullptr ? std::vector<DitUse>() : uses->with(weights, rows);
  const auto& [address, lane_stride, x_dtype] = x;
  const auto [last, to, signal] = look.value_or(std::tuple<int64_t, Address, Address>{-1, 0, 0});
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
                     given.empty() ? nullptr : given.data(),
                     results.data(),
                     pointer<void>(arena),
                     arena_bytes,
                     threads,
                     clocked ? clock.data() : nullptr,
                     checked ? &fault : nullptr,
                     pointer<const int32_t>(some.first),
                     some.second,
                     kept.data(),
                     static_cast<int64_t>(kept.size()),
                     first,
                     last,
                     starts.empty() ? nullptr : starts.data(),
                     pointer<float>(to),
                     pointer<float>(signal)};
  {
    const py::gil_scoped_release unlocked;
    dit.run(call);
  }
  return {clocked ? std::optional<Clock>(clock) : std::nullopt, fault};
}

}  // namespace

void bind_dit(py::module_& module) {
  py::class_<Uses>(module, "DitUses")
      .def(py::init<const std::vector<Use>&, const std::vector<Address>&, const std::vector<Address>&, int64_t>(),
           py::arg("uses"), py::arg("kept"), py::arg("scales"), py::arg("rows"));
  py::class_<Dit>(module, "Dit")
      .def(py::init(&make_dit), py::kw_only(), py::arg("heads"), py::arg("patch"), py::arg("channels"),
           py::arg("out_channels"), py::arg("gelu"), py::arg("eps"), py::arg("dtype"), py::arg("patches"),
           py::arg("blocks"), py::arg("final"))
      .def("arena_bytes", &Dit::arena_bytes, py::arg("rows"), py::arg("samples"), py::arg("tokens"), py::arg("threads"),
           py::arg("some") = false)
      .def("run", &run_dit, py::kw_only(), py::arg("x"), py::arg("capacity"), py::arg("lanes"), py::arg("size"),
           py::arg("positions"), py::arg("modulations"), py::arg("x_scales"), py::arg("outs"), py::arg("arena"),
           py::arg("arena_bytes"), py::arg("threads"), py::arg("clock") = false, py::arg("check") = false,
           py::arg("uses") = py::none(), py::arg("weights") = std::vector<float>(),
           py::arg("some") = std::pair<Address, int64_t>(0, 0), py::arg("first") = 0,
           py::arg("start") = std::vector<Address>(), py::arg("look") = py::none());
}

}  // namespace vivace
