"""What graphs are handed: rows branch by branch, numbers, prepared tensors, dtypes that numpy has not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import vivace
from tests.runtime.stand_in import LABELS, SHAPE, SPEC, Function, graphs_of, network, run_plan, step_runner
from vivace.engine.plan import InputRef
from vivace.engine.token_layout import Layout
from vivace.runtime import calling
from vivace.runtime.calling import Batch, Caller, Fed, Opened, branches_of, stored
from vivace.runtime.calls import calls_of
from vivace.runtime.kept import KeptPlanes
from vivace.runtime.loop import Asked, Run
from vivace.runtime.manifest import Graph, Port
from vivace.runtime.ort import shape_of, storage
from vivace.runtime.program import Given, program_of


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    return step_runner(tmp_path_factory.mktemp("step"))


def guided(steps=3, scale=2.0):
    plan = vivace.make_plan(vivace.NoiseSchedule.flow(), "euler", steps, prediction="v")
    return vivace.passes.apply_guidance(plan, scale)


def noise(n=2):
    return np.random.default_rng(0).standard_normal((n, *SHAPE)).astype(np.float32)


def only(graphs):
    return next(iter(graphs.rows.values()))


def test_rows_of_a_batch_lie_branch_by_branch(step):
    plan = guided().bind(SPEC)
    _, run = run_plan(plan, noise(2), step)
    first = only(run.graphs).runner.calls[0]
    assert np.array_equal(first["x"], np.concatenate([noise(2)] * 2))
    assert first["label"].tolist() == [1, 1, 0, 0]
    assert first["timestep"].tolist() == [np.float32(plan.steps[0].timestep)] * 4


def test_numbers_that_rows_name_are_fed_to_every_row_of_the_batch(step):
    plan = guided()
    fed = (("embedded", InputRef("guidance_scale")), ("fixed", 0.5))
    plan = replace(plan, steps=tuple(replace(s, net_inputs=fed) for s in plan.steps)).bind(SPEC)
    graphs = graphs_of(plan, step, lambda embedded, fixed, **rest: network(**rest))
    opened = only(graphs)
    ports = [Port(name, "float32", ("rows",), "number", name) for name in ("embedded", "fixed")]
    opened.graph = replace(opened.graph, inputs=(*opened.graph.inputs, *ports))
    values = {"guidance_scale": 3.5}
    asked = Asked((0,), 0, LABELS, values, {})
    run = Run(graphs, plan, Layout(SHAPE, (3, 1, 1)), asked, program_of(plan, Given(values)))
    run.step()
    assert opened.runner.calls[0]["embedded"].tolist() == [3.5, 3.5]
    assert opened.runner.calls[0]["fixed"].tolist() == [0.5, 0.5]


def prepared(plan, n):
    """A caller of graphs of which one prepares [rows, 2] of timestep and label, one a table."""
    graphs = graphs_of(plan, None, lambda vectors, table, **rest: network(**rest))
    vectors = Port("vectors", "float32", ("rows", 2), "prepared", "vectors")
    table = Port("table", "float32", ("tokens", 3), "prepared", "table")
    opened = only(graphs)
    opened.graph = replace(opened.graph, inputs=(*opened.graph.inputs, vectors, table))
    time, label = opened.graph.inputs[1], opened.graph.inputs[2]
    prepare = Function(lambda timestep, label: {"vectors": np.stack([timestep, label.astype(np.float32)], axis=1)})
    graphs.prepare = [Opened(Graph("prepare", "prepare.onnx", "prepare", (time, label), (vectors,)), prepare)]
    size = Port("size", "int64", (2,), "size")
    positions = Function(lambda size: {"table": np.ones((int(size.prod()), 3), np.float32)})
    graphs.positions = [Opened(Graph("positions", "positions.onnx", "positions", (size,), (table,)), positions)]
    kept = KeptPlanes(branches_of(plan), n)
    return graphs, Caller(graphs, plan, Fed(LABELS, {}, kept))


def test_what_does_not_depend_on_x_is_computed_once_and_read_by_row_and_branch():
    plan = guided(3).bind(SPEC)
    graphs, caller = prepared(plan, 2)
    assert len(graphs.prepare[0].runner.calls) == len(graphs.positions[0].runner.calls) == 1
    times = [np.float32(step.timestep) for step in plan.steps]
    for row in range(3):
        caller.run(calls_of(plan)[row].own[0], Batch(row, (0, 1), noise(2)))
        given = only(graphs).runner.calls[-1]
        assert given["vectors"].tolist() == [[times[row], 1.0]] * 2 + [[times[row], 0.0]] * 2
        assert given["table"].shape == (64, 3)
    assert len(graphs.prepare[0].runner.calls) == 1


def test_long_plans_are_prepared_a_window_at_a_time(monkeypatch):
    monkeypatch.setattr(calling, "WINDOW", 2)
    plan = guided(5).bind(SPEC)
    graphs, caller = prepared(plan, 1)
    for row, step in enumerate(plan.steps):
        caller.run(calls_of(plan)[row].own[0], Batch(row, (0,), noise(1)))
        assert only(graphs).runner.calls[-1]["vectors"][:, 0].tolist() == [np.float32(step.timestep)] * 2
    assert [len(call["timestep"]) for call in graphs.prepare[0].runner.calls] == [4, 4, 2]


def test_bfloat16_is_rounded_to_nearest_even_as_torch_does():
    values = np.random.default_rng(0).standard_normal(10000).astype(np.float32) * 100
    wanted = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(stored(values, "bfloat16"), wanted)
    ties = np.array([1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -1.0 - 2.0**-8], np.float32)
    assert np.array_equal(
        stored(ties, "bfloat16"), torch.from_numpy(ties).bfloat16().view(torch.int16).numpy().view(np.uint16)
    )


def test_numbers_without_axes_stay_so():
    assert stored(np.array(3), "int64").shape == () and stored(np.float64(2.5), "float32").dtype == np.float32


def test_shapes_are_known_where_all_free_dimensions_are():
    port = Port("a", "bfloat16", ("rows", 3, "length"), "kept")
    assert shape_of(port, {"rows": 2, "length": 5}) == (2, 3, 5)
    assert shape_of(port, {"rows": 2}) is None
    assert storage(port.dtype) == np.uint16 and storage("float8_e4m3fn") == np.uint8 and storage("int64") == np.int64
