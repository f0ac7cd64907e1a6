"""TensorRT 11's rules as named findings."""

import json

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.export.ruled import BROKEN, SOUND, cast, linear
from vivace.export.profiles import Profile
from vivace.export.tensorrt_rules import RULES, check_graph
from vivace.export.weights import WeightStore
from vivace.runtime.manifest import Port


@pytest.mark.parametrize("name", SOUND)
def test_sound_graphs_have_no_findings(name):
    assert check_graph(name, SOUND[name]) == []


@pytest.mark.parametrize(("rule", "name"), [(rule, name) for rule, graphs in BROKEN.items() for name in graphs])
def test_a_broken_rule_is_named_with_the_place(rule, name):
    found = check_graph(name, BROKEN[rule][name])
    assert {finding.rule for finding in found} == {rule}
    assert all(finding.graph == name and finding.at for finding in found)
    assert RULES[rule] in str(found[0])
    assert json.loads(json.dumps(found[0].to_dict()))["rule"] == rule
    assert found[0].error is (rule != "half_quantized")


def test_every_rule_has_a_graph_that_breaks_it():
    assert set(BROKEN) | {"profile"} == set(RULES)


def test_double_precision_within_a_graph_is_a_warning():
    nodes = [
        ("Cast", ["x"], ["wide"], {"to": TensorProto.DOUBLE}),
        ("Cast", ["wide"], ["y"], {"to": TensorProto.FLOAT}),
    ]
    (finding,) = check_graph("sines", cast(TensorProto.FLOAT, TensorProto.FLOAT, nodes))
    assert (finding.rule, finding.at, finding.error) == ("float64", "wide", False)


PORTS = (Port("x", "float32", ("rows", 3, "height"), "latent"), Port("ids", "int64", ("rows", "active"), "tokens"))


@pytest.mark.parametrize(
    ("dims", "wanted"),
    [
        ({"rows": (1, 2, 4), "height": (8, 8, 8), "active": (1, 4, 9)}, []),
        ({"rows": (1, 2, 4), "height": (8, 8, 8)}, ["active"]),
        ({"rows": (0, 2, 4), "height": (8, 4, 8), "active": (1, 4, 9)}, ["rows", "height"]),
        ({"rows": (1, 5, 4), "height": (8, 8, 8), "active": (1, 4, 9)}, ["rows"]),
    ],
)
def test_every_free_dimension_needs_a_range(dims, wanted):
    found = check_graph("row0", SOUND["int8"], inputs=PORTS, profile=Profile("8x8", dims))
    assert [finding.at for finding in found] == wanted
    assert {finding.rule for finding in found} <= {"profile"}


def test_scales_that_lie_in_the_weights_file_are_read_where_they_can_be():
    model = linear(W=np.ones((16, 512), np.int8), W_scale=np.full(512, -1, np.float32), bias=np.ones(512, np.float32))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3, 512]))
    with WeightStore() as store:
        for tensor in model.graph.initializer:
            if tensor.name == "W_scale":
                tensor.CopyFrom(store.tensor("W_scale", np.full(512, -1, np.float32)))
        assert check_graph("row0", model) == []
        assert [finding.rule for finding in check_graph("row0", model, read=store.array)] == ["scale"]
