// Python's view of the kernels: integers and addresses in, ValueError out. Only this folder sees Python headers.
// Addresses come from vivace.kernels, which has checked tensors; every number that indexes memory is checked here
// again.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "bindings/cache.h"
#include "bindings/dit.h"
#include "bindings/rows.h"
#include "bindings/tokens.h"
#include "core/error.h"
#include "core/machine.h"
#include "ops/adaln_modulate.h"
#include "ops/attention.h"
#include "ops/copy.h"
#include "ops/gelu.h"
#include "ops/int8_linear.h"
#include "ops/int8_norm_modulate.h"
#include "ops/philox_normal.h"
#include "ops/qk_norm_rope.h"
#include "ops/quantize_tokens.h"
#include "ops/sample_adjust.h"
#include "ops/solver_step.h"
#include "simd/cpu.h"

namespace py = pybind11;

namespace vivace {
namespace {

using Ints = std::vector<int64_t>;
using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBfloat16;
  if (name == "float16") return Dtype::kFloat16;
  fail("dtype ", name, " has no kernel; use float32, bfloat16 or float16");
}

void check_length(const char* op, const char* name, const Ints& values, size_t wanted) {
  if (values.size() != wanted) fail(op, ": ", name, " has ", values.size(), " entries for a batch of ", wanted);
}

void check_address(const char* op, const char* name, Address address, bool needed) {
  if (needed && address == 0) fail(op, ": ", name, " has no memory");
}

// (address, stride of the sample axis in elements, dtype name) of each network output.
using BranchTuple = std::tuple<Address, int64_t, std::string>;

// What the ops that run rows of a table share, checked and kept alive for a call.
struct Rows {
  const char* op;
  Address pool;
  int64_t slots, capacity, numel;
  const std::vector<BranchTuple>& outs;
  const std::vector<Address>& tensors;
  Address ints, floats;
  int64_t table_rows;
  const Ints &rows, &index;
  const std::optional<Ints>&seeds, &pictures;
  int64_t threads;
  std::vector<Branch> branches{};
  std::vector<const float*> sidecar{};

  SolverStepArgs args() {
    const bool work = numel > 0 && !rows.empty();
    check_length(op, "index", index, rows.size());
    if (seeds) check_length(op, "seeds", *seeds, rows.size());
    if (pictures) check_length(op, "pictures", *pictures, rows.size());
    check_address(op, "pool", pool, work && slots > 0 && capacity > 0);
    check_address(op, "the table", ints, table_rows > 0);
    check_address(op, "the table", floats, table_rows > 0);
    for (const auto& [address, stride, dtype] : outs) {
      check_address(op, "a network output", address, work);
      branches.push_back({pointer<void>(address), stride, parse_dtype(dtype)});
    }
    for (const Address address : tensors) {
      check_address(op, "a tensor", address, work);
      sidecar.push_back(pointer<float>(address));
    }
    SolverStepArgs made{};
    made.pool = pointer<float>(pool);
    made.slots = slots, made.capacity = capacity, made.numel = numel;
    made.outs = branches.data();
    made.branches = static_cast<int64_t>(branches.size());
    made.tensors = sidecar.data();
    made.tensor_count = static_cast<int64_t>(sidecar.size());
    made.ints = pointer<int32_t>(ints);
    made.floats = pointer<float>(floats);
    made.table_rows = table_rows;
    made.rows = rows.data();
    made.index = index.data();
    made.batch = static_cast<int64_t>(rows.size());
    made.seeds = seeds ? seeds->data() : nullptr;
    made.pictures = pictures ? pictures->data() : nullptr;
    made.threads = threads;
    return made;
  }
};

void py_solver_step(Address pool, int64_t slots, int64_t capacity, int64_t numel, const std::vector<BranchTuple>& outs,
                    Address net, const std::string& net_dtype, const std::vector<Address>& tensors, Address ints,
                    Address floats, int64_t table_rows, const Ints& rows, const Ints& index,
                    const std::optional<Ints>& seeds, const std::optional<Ints>& pictures, int64_t threads,
                    Address adjust, int64_t stream_above, Address classes, const Ints& sizes, const Ints& edges) {
  Rows shared{"solver_step", pool,       slots, capacity, numel, outs,     tensors, ints,
              floats,        table_rows, rows,  index,    seeds, pictures, threads};
  SolverStepArgs args = shared.args();
  args.net = pointer<void>(net);
  args.net_dtype = parse_dtype(net_dtype);
  args.adjust = pointer<float>(adjust);
  args.stream_above = stream_above;
  args.classes = pointer<uint8_t>(classes);
  if (edges.size() != sizes.size()) fail("solver_step: ", sizes.size(), " sizes and ", edges.size(), " edges");
  args.sizes = sizes.data(), args.edges = edges.data(), args.axes = static_cast<int64_t>(sizes.size());
  const py::gil_scoped_release unlocked;
  solver_step(args);
}

void py_sample_adjust(Address adjust, Address pool, int64_t slots, int64_t capacity, int64_t numel,
                      const std::vector<BranchTuple>& outs, const std::vector<Address>& tensors, Address ints,
                      Address floats, int64_t table_rows, const Ints& rows, const Ints& index,
                      const std::optional<Ints>& seeds, const std::optional<Ints>& pictures, int64_t threads) {
  Rows shared{"sample_adjust", pool,       slots, capacity, numel, outs,     tensors, ints,
              floats,          table_rows, rows,  index,    seeds, pictures, threads};
  check_address("sample_adjust", "adjust", adjust, !rows.empty());
  const SolverStepArgs args = shared.args();
  const py::gil_scoped_release unlocked;
  sample_adjust(args, pointer<float>(adjust));
}

void py_philox_normal(Address out, int64_t numel, const Ints& seeds, const Ints& pictures, int64_t draw,
                      int64_t threads) {
  check_length("philox_normal", "pictures", pictures, seeds.size());
  const py::gil_scoped_release unlocked;
  philox_normal(pointer<float>(out), static_cast<int64_t>(seeds.size()), numel, seeds.data(), pictures.data(), draw,
                threads);
}

// Sizes [batch, tokens, width] of the ops over rows.
using Sizes = std::array<int64_t, 3>;

void py_gated_residual(const RowTensor& out, const RowTensor& hidden, const RowTensor& update, const RowTensor& gate,
                       const Sizes& sizes, int64_t threads) {
  const py::gil_scoped_release unlocked;
  gated_residual({hidden, update, gate, out, {sizes[0], sizes[1], sizes[2]}}, threads);
}

void py_norm_modulate(const RowTensor& out, const RowTensor& hidden, const RowTensor& scale, const RowTensor& shift,
                      const RowTensor& weight, const RowTensor& bias, const Sizes& sizes, bool centred, double eps,
                      int64_t threads) {
  const py::gil_scoped_release unlocked;
  const RowShape shape{sizes[0], sizes[1], sizes[2]};
  norm_modulate({hidden, scale, shift, weight, bias, out, shape, centred, eps}, threads);
}

void py_adaln_modulate(const RowTensor& hidden_out, const RowTensor& out, const RowTensor& hidden,
                       const RowTensor& update, const RowTensor& gate, const RowTensor& scale, const RowTensor& shift,
                       const RowTensor& weight, const RowTensor& bias, const Sizes& sizes, bool centred, double eps,
                       int64_t threads) {
  const py::gil_scoped_release unlocked;
  const RowShape shape{sizes[0], sizes[1], sizes[2]};
  adaln_modulate(
      {{hidden, update, gate, hidden_out, shape}, {hidden_out, scale, shift, weight, bias, out, shape, centred, eps}},
      threads);
}

void py_gelu(const RowTensor& out, const RowTensor& hidden, const RowTensor& gate, const Sizes& sizes, bool tanh,
             int64_t threads) {
  const py::gil_scoped_release unlocked;
  gelu({hidden, gate, out, {sizes[0], sizes[1], sizes[2]}, tanh}, threads);
}

void py_quantize_tokens(Address q, Address scale, const RowTensor& x, Address smooth, Address given, const Sizes& sizes,
                        int64_t threads) {
  const py::gil_scoped_release unlocked;
  const RowShape shape{sizes[0], sizes[1], sizes[2]};
  quantize_tokens({x, pointer<float>(smooth), pointer<float>(given), pointer<int8_t>(q), pointer<float>(scale), shape},
                  threads);
}

void py_int8_norm_modulate(Address q, Address q_scale, const RowTensor& hidden, const RowTensor& scale,
                           const RowTensor& shift, const RowTensor& weight, const RowTensor& bias, Address smooth,
                           Address given, const Sizes& sizes, bool centred, double eps, int64_t threads) {
  const py::gil_scoped_release unlocked;
  const RowShape shape{sizes[0], sizes[1], sizes[2]};
  int8_norm_modulate({{hidden, scale, shift, weight, bias, {}, shape, centred, eps},
                      pointer<float>(smooth),
                      pointer<float>(given),
                      pointer<int8_t>(q),
                      pointer<float>(q_scale)},
                     threads);
}

// A packed weight: address, bytes there, columns, depth, 0 float32 | 1 bfloat16 | 3 int8.
using PackedNumbers = std::array<int64_t, 5>;

// A code that is no dtype stays none, and is refused by who takes it.
Dtype dtype_of(int64_t code) { return code == static_cast<int8_t>(code) ? static_cast<Dtype>(code) : Dtype{-1}; }

PackedMatrix packed(const PackedNumbers& n) {
  const PackedMatrix matrix{pointer<void>(n[0]), n[2], n[3], dtype_of(n[4])};
  const int64_t needed = packed_bytes(matrix.columns, matrix.depth, matrix.dtype);
  if (n[1] < needed) fail("a packed weight has ", n[1], " bytes, needs ", needed);
  if (n[0] % 64 != 0) fail("a packed weight lies at ", n[0], ", needs a multiple of 64");
  return matrix;
}

void py_pack_matrix(const PackedNumbers& to, Address src, int64_t row_stride, int64_t threads) {
  const PackedMatrix matrix = packed(to);
  const py::gil_scoped_release unlocked;
  pack_matrix(pointer<void>(to[0]), pointer<void>(src), matrix.columns, matrix.depth, row_stride, matrix.dtype,
              threads);
}

Activation parse_activation(const char* op, int64_t code) {
  if (code != static_cast<int32_t>(code)) fail(op, ": activation ", code, " is unknown");
  return static_cast<Activation>(code);
}

void py_linear(const RowTensor& out, const RowTensor& x, const PackedNumbers& weight, Address bias, int64_t activation,
               const RowTensor& gate, const RowTensor& residual, const Sizes& sizes, int64_t threads) {
  const py::gil_scoped_release unlocked;
  linear({x,
          packed(weight),
          pointer<float>(bias),
          parse_activation("linear", activation),
          gate,
          residual,
          out,
          {sizes[0], sizes[1], sizes[2]}},
         threads);
}

// x: address, 0 float32 | 1 bfloat16 | 3 int8, strides of sample and token; scales, smooth: addresses, 0 where absent.
void py_int8_linear(const RowTensor& out, const std::array<int64_t, 4>& x, Address x_scale, Address smooth,
                    const PackedNumbers& weight, Address weight_scale, Address bias, int64_t activation,
                    const RowTensor& gate, const RowTensor& residual, const Sizes& sizes, int64_t threads) {
  const py::gil_scoped_release unlocked;
  int8_linear({{pointer<void>(x[0]), dtype_of(x[1]), x[2], x[3]},
               pointer<float>(x_scale),
               packed(weight),
               pointer<float>(weight_scale),
               pointer<float>(bias),
               parse_activation("int8_linear", activation),
               gate,
               residual,
               out,
               {sizes[0], sizes[1], sizes[2]},
               pointer<float>(smooth)},
              threads);
}

// Heads: (address, strides of sample, token, head).
using HeadNumbers = std::array<int64_t, 4>;

HeadTensor heads(const HeadNumbers& n) { return {pointer<void>(n[0]), n[1], n[2], n[3]}; }

// Where the part of every lane begins; data 0: nowhere.
std::vector<const void*> parts_at(const HeadNumbers& n, Dtype dtype, const Ints& lanes, int64_t parts) {
  std::vector<const void*> at;
  for (const int64_t lane : lanes) {
    if (lane < 0 || lane >= parts) fail("attention: lane ", lane, " of ", parts);
    const int64_t offset = lane * n[1] * dtype_size(dtype);
    at.push_back(n[0] == 0 ? nullptr : pointer<char>(static_cast<Address>(n[0])) + offset);
  }
  return at;
}

// Sizes: batch, heads, queries, keys, width; lanes: which of so many parts of key and value each sample reads.
void py_attention(const HeadNumbers& out, const HeadNumbers& query, const HeadNumbers& key, const HeadNumbers& value,
                  const std::array<int64_t, 5>& sizes, int64_t dtype, float scale, int64_t threads,
                  const std::optional<Ints>& lanes, int64_t parts) {
  const py::gil_scoped_release unlocked;
  if (dtype != static_cast<int32_t>(dtype)) fail("attention: there are no heads of dtype ", dtype);
  AttentionArgs args{heads(query), heads(key), heads(value), heads(out), static_cast<Dtype>(dtype), sizes[0], sizes[1],
                     sizes[2],     sizes[3],   sizes[4],     scale};
  std::vector<const void*> keys, values;
  if (lanes) {
    if (static_cast<int64_t>(lanes->size()) != args.batch)
      fail("attention: ", lanes->size(), " lanes for a batch of ", args.batch);
    keys = parts_at(key, args.dtype, *lanes, parts), values = parts_at(value, args.dtype, *lanes, parts);
    args.key_at = keys.data(), args.value_at = values.data();
  }
  attention(args, threads);
}

// x and out (address, strides of sample, token, head), weight and bias (address or 0, dtype, size), tokens, heads.
using SideNumbers = std::array<int64_t, 16>;
// cos and sin (address, strides of sample, row), first turned token, number of them.
using TurnNumbers = std::array<int64_t, 8>;

QkSide qk_side(const SideNumbers& n, bool turned) {
  const auto vector = [&](size_t i) { return HeadVector{pointer<void>(n[i]), static_cast<Dtype>(n[i + 1]), n[i + 2]}; };
  return {{pointer<void>(n[0]), n[1], n[2], n[3]},
          {pointer<void>(n[4]), n[5], n[6], n[7]},
          vector(8),
          vector(11),
          n[14],
          n[15],
          turned};
}

void py_qk_norm_rope(const SideNumbers& query, const SideNumbers& key, const std::optional<TurnNumbers>& turn,
                     bool turn_key, bool halves, int64_t batch, int64_t width, int64_t dtype, int64_t kind, double eps,
                     int64_t threads) {
  const py::gil_scoped_release unlocked;
  const TurnNumbers t = turn.value_or(TurnNumbers{});
  const TurnTable cos{pointer<float>(t[0]), t[1], t[2]}, sin{pointer<float>(t[3]), t[4], t[5]};
  qk_norm_rope({{qk_side(query, turn.has_value()), qk_side(key, turn.has_value() && turn_key)},
                batch,
                width,
                static_cast<Dtype>(dtype),
                static_cast<HeadNormKind>(kind),
                eps,
                cos,
                sin,
                t[6],
                t[7],
                halves},
               threads);
}

}  // namespace
}  // namespace vivace

PYBIND11_MODULE(_C, module) {
  using namespace vivace;
  module.doc() = "Compiled kernels of Vivace: see vivace.kernels for the functions meant to be called.";
  module.def("isa", [] { return std::string(kernels().name); });
  module.def("available_isas", &available_isas);
  module.def("usable_processors", &usable_processors);
  module.def("last_level_cache_bytes", &last_level_cache_bytes);
  module.def("solver_step", &py_solver_step, py::kw_only(), py::arg("pool"), py::arg("slots"), py::arg("capacity"),
             py::arg("numel"), py::arg("outs"), py::arg("net"), py::arg("net_dtype"), py::arg("tensors"),
             py::arg("ints"), py::arg("floats"), py::arg("table_rows"), py::arg("rows"), py::arg("index"),
             py::arg("seeds"), py::arg("pictures"), py::arg("threads"), py::arg("adjust") = 0,
             py::arg("stream_above") = -1, py::arg("classes") = 0, py::arg("sizes") = Ints{},
             py::arg("edges") = Ints{});
  module.def("sample_adjust", &py_sample_adjust, py::kw_only(), py::arg("adjust"), py::arg("pool"), py::arg("slots"),
             py::arg("capacity"), py::arg("numel"), py::arg("outs"), py::arg("tensors"), py::arg("ints"),
             py::arg("floats"), py::arg("table_rows"), py::arg("rows"), py::arg("index"), py::arg("seeds"),
             py::arg("pictures"), py::arg("threads"));
  module.def("philox_normal", &py_philox_normal, py::arg("out"), py::arg("numel"), py::arg("seeds"),
             py::arg("pictures"), py::arg("draw"), py::arg("threads"));
  // Positional: names would cost more than the rest of a call.
  module.def("attention", &py_attention, py::arg("out"), py::arg("query"), py::arg("key"), py::arg("value"),
             py::arg("sizes"), py::arg("dtype"), py::arg("scale"), py::arg("threads"), py::arg("lanes") = py::none(),
             py::arg("parts") = 0);
  module.def("gated_residual", &py_gated_residual);
  module.def("norm_modulate", &py_norm_modulate);
  module.def("adaln_modulate", &py_adaln_modulate);
  module.def("gelu", &py_gelu);
  module.def("int8_linear", &py_int8_linear);
  module.def("int8_norm_modulate", &py_int8_norm_modulate);
  module.def("linear", &py_linear);
  module.def("run_products", [](int64_t dtype, int64_t steps, int64_t threads) {
    const py::gil_scoped_release unlocked;
    return run_products(dtype_of(dtype), steps, threads);
  });
  module.def("packed_bytes", [](int64_t columns, int64_t depth, int64_t dtype) {
    return packed_bytes(columns, depth, dtype_of(dtype));
  });
  module.def("pack_matrix", &py_pack_matrix);
  module.def("qk_norm_rope", &py_qk_norm_rope);
  module.def("quantize_tokens", &py_quantize_tokens);
  const auto copy = [](auto function) {
    return [function](Address dst, Address src, int64_t bytes, int64_t threads) {
      const py::gil_scoped_release unlocked;
      function(pointer<void>(dst), pointer<void>(src), bytes, threads);
    };
  };
  module.def("copy_memcpy", copy(&copy_memcpy), py::arg("dst"), py::arg("src"), py::arg("bytes"), py::arg("threads"));
  module.def("copy_stream", copy(&copy_stream), py::arg("dst"), py::arg("src"), py::arg("bytes"), py::arg("threads"));
  bind_cache(module);
  bind_dit(module);
  bind_tokens(module);
}
