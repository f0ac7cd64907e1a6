"""The step as a graph: one for every row, checked, deterministic, the sum it says."""

import numpy as np
import onnx
import pytest

from tests.runtime.stand_in import step_runner
from vivace.errors import BackendError, PackError
from vivace.export.step import step_graph


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    return step_runner(tmp_path_factory.mktemp("step"))


def run(step, slots, coefficients, fields):
    results = np.empty((len(slots), coefficients.shape[1], slots.shape[2]), np.float32)
    given = {"slots": slots, "coefficients": coefficients, "fields": fields}
    return step.runner.run(given, {"results": results})["results"]


def drawn(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("opset", [21, 23])
def test_the_graph_is_valid_and_always_the_same_bytes(opset):
    made = step_graph(opset)
    onnx.checker.check_model(made.model, full_check=True)
    assert onnx.shape_inference.infer_shapes(made.model, check_type=True, strict_mode=True, data_prop=True)
    assert made.model.SerializeToString(deterministic=True) == step_graph(opset).model.SerializeToString(
        deterministic=True
    )
    assert [node.name for node in made.model.graph.node] == ["step.sources", "step.combine"]


@pytest.mark.parametrize(
    ("n", "sources", "outs", "elements"), [(1, 1, 1, 1), (1, 3, 2, 48), (3, 12, 4, 65), (2, 1, 5, 7)]
)
@pytest.mark.parametrize("fielded", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_every_number_of_pictures_sources_and_outputs_runs_in_one_graph(
    step, n, sources, outs, elements, fielded, each
):
    slots, coefficients = drawn(n, sources, elements), drawn(n if each else 1, outs, sources)
    fields = drawn(n, sources, elements) + 1 if fielded else np.ones((1, 1, 1), np.float32)
    exact = coefficients.astype(np.float64) @ (slots.astype(np.float64) * fields)
    eager = coefficients @ (slots * fields)
    found = run(step, slots, coefficients, fields)
    scale = np.abs(exact).max()
    assert np.abs(found - exact).max() / scale <= 2 * np.abs(eager - exact).max() / scale + 2.0**-24


def test_a_coefficient_of_one_hands_a_slot_on_with_its_bits(step):
    slots = drawn(2, 3, 64)
    assert np.array_equal(run(step, slots, np.eye(3, dtype=np.float32)[None], np.ones((1, 1, 1), np.float32)), slots)


@pytest.mark.parametrize("slots", [np.ones((1, 2, 4)), np.ones((1, 4, 2), np.float32).transpose(0, 2, 1)])
def test_memory_that_is_not_as_the_port_says_is_never_read(step, slots):
    with pytest.raises(PackError, match="'slots' takes float32 side by side"):
        run(step, slots, np.ones((1, 1, 2), np.float32), np.ones((1, 1, 1), np.float32))


def test_memory_of_another_shape_is_never_written(step):
    given = {"slots": drawn(1, 2, 4), "coefficients": drawn(1, 3, 2), "fields": np.ones((1, 1, 1), np.float32)}
    with pytest.raises(BackendError, match=r"step\.onnx failed"):
        step.runner.run(given, {"results": np.empty((1, 3, 3), np.float32)})
