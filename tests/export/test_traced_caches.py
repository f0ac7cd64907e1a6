"""Graphs of cached rows and of rows of some tokens, of every family: whole plans against the eager executor."""

import numpy as np
import pytest

from tests.export.families import load, pack_of
from vivace.errors import ArgumentError, UnsupportedError
from vivace.export.traced import traced_graphs
from vivace.export.weights import WeightStore
from vivace.runtime import verify_pack
from vivace.runtime.calls import Kept, Structure, structures_of

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
    (full,) = [graph for graph in rows if not graph.structure.kept]
    assert (pack.path / tail.file).stat().st_size < 0.8 * (pack.path / full.file).stat().st_size


def test_forecasts_read_weights_on_planes():
    rows = [graph for graph in pack_of("flux").manifest.graphs if graph.role == "row"]
    (graph,) = [graph for graph in rows if any(kept.terms == 2 for kept in graph.structure.kept)]
    assert [port.shape for port in graph.inputs if port.source == "weights"] == [(2,)]
    assert sorted({port.plane for port in graph.inputs if port.source == "kept"}) == [0, 1]


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_any_number_of_tokens_can_be_active(name):
    pack = pack_of(name)
    (graph,) = [graph for graph in pack.manifest.graphs if graph.structure and graph.structure.tokens]
    outs = [run(pack, graph, active) for active in (2, 5, 16)]
    assert all(np.isfinite(out).all() for out in outs)
    assert {out.shape for out in outs} == {(1, 4, 8, 8)}


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
    pipe = load("sd15")
    denoiser = pipe._denoiser(dict(pipe.networks))
    with WeightStore() as store:
        asked = {"dtype": "float32", "opset": 21, "store": store}
        with pytest.raises(UnsupportedError, match="freeze the plan"):
            traced_graphs(denoiser, [Structure(look="first_block", begin=1)], **asked)
        with pytest.raises(UnsupportedError, match="convolutions"):
            traced_graphs(denoiser, [Structure(tokens=True)], **asked)
        with pytest.raises(UnsupportedError, match="has no site 'mlp'"):
            traced_graphs(denoiser, [Structure(kept=(Kept("mlp", 1, 2, False),))], **asked)
        with pytest.raises(ArgumentError, match="load it in that dtype"):
            traced_graphs(denoiser, [Structure()], **(asked | {"dtype": "float16"}))
        with pytest.raises(ArgumentError, match="opset 20"):
            traced_graphs(denoiser, [Structure()], **(asked | {"opset": 20}))
