"""Graphs of cached rows and of rows of some tokens, of every family: whole plans against the eager executor."""

import numpy as np
import pytest

from tests.export.families import load, pack_of, plan_of
from vivace.errors import UnsupportedError
from vivace.export.traced import traced_graphs
from vivace.export.weights import WeightStore
from vivace.runtime import verify_pack
from vivace.runtime.calls import Structure, structures_of

NAMES = ("pixart", "sd3", "flux", "sd15")


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_runs_in_graphs_as_in_the_eager_executor(name):
    report = verify_pack(pack_of(name))
    assert report.holds
    assert report.error <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_a_graph_of_what_it_computes(name):
    pack = pack_of(name)
    rows = {graph.structure: graph for graph in pack.manifest.graphs if graph.role == "row"}
    assert set(rows) == set(structures_of(pack.plan))
    for structure, graph in rows.items():
        given = {kept.name for kept in structure.kept if kept.gives}
        assert {port.key for port in graph.inputs if port.source == "kept"} >= given
        made = {kept.name for kept in structure.kept if not kept.gives}
        assert {port.key for port in graph.outputs if port.source == "kept"} >= made
        assert structure.tokens == any(port.source == "tokens" for port in graph.inputs)


def test_blocks_that_are_given_are_not_in_the_graph():
    pack = pack_of("sd15")
    rows = [graph for graph in pack.manifest.graphs if graph.role == "row"]
    (tail,) = [graph for graph in rows if any(kept.gives for kept in graph.structure.kept)]
    full = next(graph for graph in rows if graph is not tail)
    assert (pack.path / tail.file).stat().st_size < 0.8 * (pack.path / full.file).stat().st_size


def test_forecasts_read_weights_on_planes():
    (graph,) = [g for g in pack_of("flux").manifest.graphs if g.structure and any(k.terms == 2 for k in g.structure.kept)]
    assert [port.shape for port in graph.inputs if port.source == "weights"] == [(2,)]
    assert sorted({port.plane for port in graph.inputs if port.source == "kept"}) == [0, 1]


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_any_number_of_tokens_can_be_active(name):
    pack = pack_of(name)
    (graph,) = [g for g in pack.manifest.graphs if g.structure and g.structure.tokens and not made(g)][:1]
    outs = [run(pack, graph, active) for active in (2, 5, 16)]
    assert all(np.isfinite(out).all() for out in outs)
    assert {out.shape for out in outs} == {(1, 4, 8, 8)}


def made(graph):
    """It keeps something beside keys and values."""
    return any(not kept.gives for kept in graph.structure.kept)


def run(pack, graph, active):
    """The prediction of one row with that many active tokens."""
    import onnxruntime

    free = {"rows": 1, "active": active, "length": 6}
    feeds = {}
    for port in graph.inputs:
        shape = [free.get(size, size) for size in port.shape]
        ids = port.source == "tokens"
        feeds[port.name] = np.arange(active)[None] if ids else np.ones(shape, np.dtype(port.dtype))
    (out,) = onnxruntime.InferenceSession(str(pack.path / graph.file)).run(["prediction"], feeds)
    return out


def test_what_a_family_cannot_do_is_refused_before_any_graph_is_made():
    denoiser = load("sd15")._denoiser({"main": load("sd15").networks["main"]})
    with WeightStore() as store:
        with pytest.raises(UnsupportedError, match="freeze the plan"):
            traced_graphs(denoiser, [Structure(look="first_block", begin=1)], dtype="float32", opset=21, store=store)
        with pytest.raises(UnsupportedError, match="convolutions"):
            traced_graphs(denoiser, [Structure(tokens=True)], dtype="float32", opset=21, store=store)


def test_plans_differ_as_the_tests_say():
    assert all(any(s.kept for s in structures_of(plan_of(name, pipe).bind(pipe.spec))) for name in NAMES for pipe in [load(name)])
