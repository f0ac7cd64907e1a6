"""Small graphs, each of which breaks one of TensorRT's rules, and sound ones."""

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper, numpy_helper

K, N = 16, 8
FLOAT, INT8, UINT8 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def model_of(nodes, inputs, outputs, constants=None, opset=21, domains=()):
    ends = [[helper.make_tensor_value_info(name, *what) for name, what in side.items()] for side in (inputs, outputs)]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(
        [helper.make_node(*node[:3], name=node[2][0], **node[3]) for node in nodes], "g", *ends, tensors
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", opset), *domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def linear(**changes):
    """A linear layer in Q/DQ form as it should be, but for what is changed."""
    constants = {"scale": np.float32(0.1), "zero": np.int8(0), "W": np.ones((K, N), np.int8)}
    constants |= {"W_scale": np.full(N, 0.01, np.float32), "bias": np.ones(N, np.float32)}
    constants |= {name: value for name, value in changes.items() if name in constants}
    axis, extra = changes.get("axis", 1), changes.get("extra", [])
    inputs = {"x": (FLOAT, ["rows", 3, K]), **changes.get("inputs", {})}
    for name in [*changes.get("inputs", {}), *changes.get("without", ())]:
        constants.pop(name, None)
    zero = [] if "zero" in changes.get("without", ()) else ["zero"]
    nodes = [
        ("QuantizeLinear", ["x", "scale", *zero], ["codes"], changes.get("activation", {})),
        ("DequantizeLinear", ["codes", "scale", *zero], ["read"], changes.get("activation", {})),
        ("DequantizeLinear", ["W", "W_scale"], ["W_wide"], {"axis": axis} if constants["W_scale"].ndim else {}),
        ("MatMul", [changes.get("left", "read"), "W_wide"], ["product"], {}),
        *extra,
        ("Add", ["product", changes.get("added", "bias")], ["y"], {}),
    ]
    outputs = {"y": (FLOAT, ["rows", 3, N]), **changes.get("outputs", {})}
    return model_of(nodes, inputs, outputs, constants)


def cast(source, target, nodes=None):
    """x of one type, y of another."""
    nodes = nodes or [("Cast", ["x"], ["y"], {"to": target})]
    return model_of(nodes, {"x": (source, ["rows", 4])}, {"y": (target, ["rows", 4])})


def own(kind, opset=21, **attributes):
    return model_of(
        [(kind, ["x"], ["y"], attributes)], {"x": (FLOAT, ["rows", 4])}, {"y": (FLOAT, ["rows", 4])}, opset=opset
    )


SOUND = {
    "int8": linear(),
    "one-weight-scale": linear(W_scale=np.float32(0.01)),
    "float8": linear(zero=np.zeros((), FP8), W=np.ones((K, N), FP8)),
    "gelu": own("Gelu", approximate="tanh"),
    "bytes-out": cast(FLOAT, UINT8),
    "bytes-in": cast(UINT8, FLOAT),
    "int8-kept": cast(FLOAT, INT8),
    "float8-kept": model_of(
        [("QuantizeLinear", ["x", "one", "zero"], ["y"], {})],
        {"x": (FLOAT, ["rows", 4])},
        {"y": (TensorProto.FLOAT8E4M3FN, ["rows", 4])},
        {"one": np.float32(1), "zero": np.zeros((), FP8)},
    ),
}
# rule -> graphs that break it; those of `ACCEPTED` RTX 1.7 takes all the same
BROKEN = {
    "zero_point": {
        "uint8": linear(zero=np.uint8(128)),
        "no-zero": linear(without=("zero",)),
        "shifted": linear(zero=np.int8(3)),
    },
    "scale": {
        "computed": linear(inputs={"scale": (FLOAT, [])}),
        "negative": linear(W_scale=np.full(N, -0.01, np.float32)),
        "infinite": linear(scale=np.float32(np.inf)),
    },
    "activation": {
        "by-channel": linear(scale=np.full(K, 0.1, np.float32), zero=np.zeros(K, np.int8), activation={"axis": 2})
    },
    "weight": {"by-input": linear(W_scale=np.full(K, 0.01, np.float32), axis=0)},
    "bias": {
        "int32": linear(
            bias=np.ones(N, np.int32),
            added="bias_wide",
            extra=[("DequantizeLinear", ["bias", "scale"], ["bias_wide"], {})],
        )
    },
    "placement": {
        "codes-read": linear(
            extra=[("Cast", ["codes"], ["codes_wide"], {"to": FLOAT})], outputs={"codes_wide": (FLOAT, ["rows", 3, K])}
        )
    },
    "half_quantized": {"weight-only": linear(left="x")},
    "uint8": {
        "between": cast(
            FLOAT,
            UINT8,
            [("Cast", ["x"], ["b"], {"to": UINT8}), ("Identity", ["b"], ["c"], {}), ("Identity", ["c"], ["y"], {})],
        )
    },
    "float8": {"by-cast": cast(FLOAT, TensorProto.FLOAT8E4M3FN)},
    "float64": {"port": cast(TensorProto.DOUBLE, FLOAT)},
    "rank": {
        "nine": model_of(
            [("Reshape", ["x", "many"], ["wide"], {}), ("Reshape", ["wide", "few"], ["y"], {})],
            {"x": (FLOAT, ["rows", 4])},
            {"y": (FLOAT, ["rows", 4])},
            {"many": np.int64([-1, 1, 1, 1, 1, 1, 1, 2, 2]), "few": np.int64([-1, 4])},
        )
    },
    "operator": {
        "products": model_of(
            [("MatMulInteger", ["x", "W"], ["y"], {})],
            {"x": (INT8, ["rows", K])},
            {"y": (TensorProto.INT32, ["rows", N])},
            {"W": np.ones((K, N), np.int8)},
        )
    },
    "opset": {"old": own("Relu", opset=8)},
    "domain": {
        "foreign": model_of(
            [("FastGelu", ["x"], ["y"], {"domain": "com.microsoft"})],
            {"x": (FLOAT, ["rows", 4])},
            {"y": (FLOAT, ["rows", 4])},
            domains=(("com.microsoft", 1),),
        )
    },
}
ACCEPTED = frozenset(
    {"by-channel", "by-input", "infinite", "no-zero", "computed", "weight-only", "port", "codes-read", "old", "between"}
)
