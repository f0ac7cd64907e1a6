"""The bench of exports: what it takes for the work of a row, and what it refuses to measure."""

import pytest

import vivace
from vivace.bench import export
from vivace.bench.export_packs import variants
from vivace.export import export_onnx
from vivace.runtime.ort import OnnxRuntime


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    pipe = vivace.load("emoji")
    return export_onnx(pipe, variants(pipe.spec), tmp_path_factory.mktemp("bench") / "pack")


def test_shares_are_those_of_what_rows_leave_out(pack):
    shares = export.shares_of(pack, vivace.load("emoji").spec.costs)
    assert set(shares) == {graph.name for graph in pack.graphs("row")}
    assert shares[export.whole(pack).name] == 1.0
    for name, share in shares.items():
        structure = pack.row(next(graph.structure for graph in pack.graphs("row") if graph.name == name)).structure
        assert (share < 1.0) == (structure.tokens or any(kept.gives for kept in structure.kept)), name


def test_every_row_graph_runs_on_the_inputs_that_are_timed(pack):
    for graph in pack.graphs("row"):
        forward = export.Forward(pack, graph, OnnxRuntime(1))
        assert all(memory.shape[0] == export.ROWS for memory in forward().values())


def test_a_claim_without_its_peer_says_why(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows, claim = export.rtx_built(True)
    assert not rows and claim.value is None and "make bench-setup" in claim.how
