"""Graphs built node by node: names, outputs, what is left out."""

import numpy as np
import onnx
import onnxruntime
import pytest

from vivace.export.builder import GraphBuilder
from vivace.runtime.manifest import Port

X, Y = Port("x", "float32", ("rows", 2), "latent"), Port("y", "float32", ("rows", 2), "condition", "y")


def out(name):
    return Port(name, "float32", ("rows", 2), "prediction")


def test_a_graph_has_what_its_outputs_need_and_the_latent():
    to = GraphBuilder("g", 21)
    x, y = to.input(X), to.input(Y)
    to.op("Mul", x, y, name="wasted")
    unused = to.constant(3.0, "float32")
    to.output(out("a"), to.op("Add", to.constant([1.0, 2.0], "float32"), to.constant([1.0, 2.0], "float32")))
    graph = to.made("row")
    assert [node.op_type for node in graph.model.graph.node] == ["Add"]
    assert [port.name for port in graph.inputs] == ["x"]
    assert unused not in [tensor.name for tensor in graph.model.graph.initializer]
    assert len(graph.model.graph.initializer) == 1


def test_a_value_that_is_two_outputs_or_an_input_is_copied():
    to = GraphBuilder("g", 21)
    x = to.input(X)
    doubled = to.op("Add", x, x)
    for name, value in (("a", doubled), ("b", doubled), ("c", x)):
        to.output(out(name), value)
    model = to.made("row").model
    onnx.checker.check_model(model, full_check=True)
    given = np.float32([[1, 2]])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert [made.tolist() for made in session.run(["a", "b", "c"], {"x": given})] == [[[2, 4]], [[2, 4]], [[1, 2]]]


def test_names_tell_where_a_node_is_and_none_is_taken_twice():
    to = GraphBuilder("g", 21)
    x = to.input(X)
    with to.scope("blocks.3"), to.scope("attn"):
        assert to.op("Neg", x, name="qkv") == "blocks.3.attn.qkv"
        assert to.op("Neg", x, name="qkv") == "blocks.3.attn.qkv-2"
    with pytest.raises(RuntimeError, match="two things are called 'x'"):
        to.output(out("x"), x)


def test_equal_constants_are_one_and_others_have_names_of_their_own():
    to = GraphBuilder("g", 21)
    assert to.constant([0, -1, 2]) == to.constant((0, -1, 2)) == "int64x3[0_-1_2]"
    near = [to.constant(1.0 + i / 2**22, "float32") for i in range(2)]
    assert near[0] != near[1]
    names = {to.constant(np.arange(20) + i, "float64") for i in range(3)} | {
        to.constant(0.1),
        to.constant(0.1, "float32"),
    }
    assert len(names) == 5
