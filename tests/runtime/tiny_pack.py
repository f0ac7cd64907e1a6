"""A pack of hand-made graphs: small, of every kind of part, for tests of the format and of the loop around it."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from vivace.engine.bind import ModelSpec
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_block_cache, apply_guidance
from vivace.engine.planning import make_plan
from vivace.export.pack import MadeGraph, write_pack
from vivace.export.weights import WeightStore
from vivace.runtime.calls import structures_of
from vivace.runtime.manifest import Port

C, SIDE = 4, 8
SPEC = ModelSpec("tiny", "f" * 64, "flow", (C, SIDE, SIDE), 2, (2, 2), 1, ("cond", "uncond"), "class", width=16)
MODEL = {"name": "tiny", "licence": "none", "fingerprint": "f" * 64, "prediction": "flow"}
MODEL |= {"latent_shape": (C, SIDE, SIDE), "blocks": 2, "patch": (2, 2), "token_group": 1, "width": 16}
OPSET = 21
X = (TensorProto.FLOAT, ["rows", C, SIDE, SIDE])
KEPT = (TensorProto.FLOAT, ["rows", C, SIDE, SIDE])


def tiny_plan(steps=4):
    """Guided, the residual of both blocks given again in every other row: two structures."""
    plan = apply_guidance(make_plan(NoiseSchedule.flow(), "euler", steps, prediction="flow"), 2.0)
    return apply_block_cache(plan, "fora", interval=2, sites=("residual",), first=1, last=0).bind(SPEC)


def tiny_weight(seed=0):
    return np.random.default_rng(seed).standard_normal((SIDE, SIDE * SIDE)).astype(np.float32)


def model_of(name, inputs, outputs, nodes, initializers, opset=OPSET):
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(port, *what) for port, what in inputs.items()],
        [helper.make_tensor_value_info(port, *what) for port, what in outputs.items()],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def port(name, what, source, **rest):
    dtype = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64"}[what[0]]
    return Port(name, dtype, tuple(what[1]), source, **rest)


def row_graph(name, structure, store, opset=OPSET):
    """Prediction = x W V, or where the residual is given x plus what is kept; keeps x W V - x."""
    first = store.tensor("first.weight", tiny_weight())
    second = store.tensor("second.weight", np.ascontiguousarray(tiny_weight().T))
    inputs, outputs = {"x": X, "timestep": (TensorProto.FLOAT, ["rows"])}, {"prediction": X}
    ins, outs = [port("x", X, "latent"), port("timestep", inputs["timestep"], "timestep")], []
    outs.append(port("prediction", X, "prediction"))
    kept = structure.kept[0] if structure.kept else None
    if kept is not None and kept.gives:
        inputs["kept"] = KEPT
        ins.append(port("kept", KEPT, "kept", key=kept.name))
        nodes = [helper.make_node("Add", ["x", "kept"], ["prediction"], "give")]
        initializers = []
    else:
        nodes = [
            helper.make_node("MatMul", ["x", "first.weight"], ["wide"], "first"),
            helper.make_node("MatMul", ["wide", "second.weight"], ["prediction"], "second"),
        ]
        initializers = [first, second]
    if kept is not None and not kept.gives:
        outputs["kept_out"] = KEPT
        outs.append(port("kept_out", KEPT, "kept", key=kept.name))
        nodes.append(helper.make_node("Sub", ["prediction", "x"], ["kept_out"], "keep"))
    model = model_of(name, inputs, outputs, nodes, initializers, opset)
    return MadeGraph(name, "row", model, tuple(ins), tuple(outs), structure)


def decode_graph(store):
    """The first weight again, under another name: stored once."""
    weight = store.tensor("decoder.weight", tiny_weight())
    out = (TensorProto.FLOAT, ["rows", C, SIDE, SIDE * SIDE])
    node = helper.make_node("MatMul", ["latent", "decoder.weight"], ["picture"], "decode")
    model = model_of("decode", {"latent": X}, {"picture": out}, [node], [weight])
    return MadeGraph("decode", "decode", model, (port("latent", X, "latent"),), (port("picture", out, "picture"),))


def parts(store, **changes):
    """Arguments of `write_pack`."""
    plan = changes.pop("plan", None) or tiny_plan()
    opset = changes.get("opset", OPSET)
    rows = [row_graph(f"row-{i}", each, store, opset) for i, each in enumerate(structures_of(plan))]
    made = {
        "graphs": [*rows, decode_graph(store)],
        "store": store,
        "plan": plan,
        "goldens": {"noise": np.zeros((2, C, SIDE, SIDE), np.float32)},
        "metadata": {"request": '{"n": 2, "prompt": "one", "seed": 7}'},
        "model": MODEL,
        "prompts": {"kind": "class", "classes": 2, "names": [[0, "one", ""], [1, "two", ""]]},
        "precision": {"network": "float32", "int8": "", "scheme": {}},
        "opset": OPSET,
        "tolerance": 1e-4,
        "weights": {"float32": 2 * 4 * SIDE**3},
        "versions": {"onnx": onnx.__version__},
    }
    return made | changes


def write_tiny(out, **changes):
    with WeightStore() as store:
        return write_pack(out, **parts(store, **changes))
