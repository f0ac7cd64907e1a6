"""Rows of the native DiT that keep, give again and look, as graphs, against the eager oracle."""

from dataclasses import replace

import pytest
import torch

from tests.export.dit_runs import Graphs, Pack, structures_of, tiny_folder_of
from tests.models.caching.rows import BRANCHES, LABELS, SAMPLES, TIMES, Case, Memory, every, keep
from tests.models.caching.test_native_rows import ROWS, holds
from vivace.engine.plan import Action
from vivace.models.perturbed import perturbed_dit
from vivace.runtime.calls import Structure

STORES = ("fp32", "bf16", "fp16", "fp8", "int8")
STORED = ("halves", "residual", "block")
PLAIN = Structure()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder_of(tmp_path_factory.mktemp("tiny") / "transformer")


@pytest.fixture(scope="module")
def case(tiny):
    return Case(tiny, torch.float32)


@pytest.fixture(scope="module")
def pack(case, tmp_path_factory):
    wanted = {PLAIN: None}
    for name, rows in ROWS.items():
        for store in (None, *STORES) if name in STORED else (None,):
            wanted |= dict.fromkeys(structures_of(rows, store))
    return Pack(case, Graphs(tmp_path_factory.mktemp("graphs"), case.model, tuple(wanted)))


@pytest.mark.parametrize("name", list(ROWS))
def test_rows_err_no_more_than_twice_the_eager_oracle(case, pack, name):
    holds(pack.run(ROWS[name]), case.run("eager", ROWS[name]), case.exact().run("eager", ROWS[name]))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", STORED)
def test_rows_kept_in_any_store_err_no_more_than_twice_the_eager_oracle(case, pack, name, store):
    eager = case.run("eager", ROWS[name], store)
    holds(pack.run(ROWS[name], store), eager, case.exact().run("eager", ROWS[name]))


@pytest.mark.parametrize(("metric", "params"), [("first_block", (2,)), ("modulated_input", ())])
def test_a_look_sees_what_the_eager_look_sees_and_the_row_goes_on_from_it(case, tmp_path, metric, params):
    row = [keep("attn", (2, 3))]
    begin = 2 if params else 0
    looked = Structure(begin=begin, look=metric)
    (wanted,) = structures_of([row])
    wanted = replace(wanted, begin=begin)
    pack = Pack(case, Graphs(tmp_path, case.model, (looked, wanted)))
    made = pack.outputs(0, BRANCHES, looked, (), range(SAMPLES))
    signal, hidden = (value for value in made.values())
    seen, exact = (each.look(0, metric, params, range(SAMPLES)) for each in (case, case.exact()))
    for found, name in ((signal, "signal"), (hidden, "states")):
        holds(torch.from_numpy(found).unflatten(0, (2, -1)), getattr(seen, name), getattr(exact, name))
    found = pack.call(0, BRANCHES, wanted, [()], range(SAMPLES), hidden=hidden)
    holds(torch.stack([*found.values()]), case.run("eager", [row])[0], case.exact().run("eager", [row])[0])


def test_a_row_that_goes_on_from_a_look_takes_hidden_states_and_no_positions(case, tmp_path):
    graph = Graphs(tmp_path, case.model, (Structure(begin=1),)).named["row0-from1"]
    assert [port.name for port in graph.inputs] == ["x", "modulation", "hidden", "final"]


def test_blocks_whose_attention_map_is_the_identity_give_their_values(case, tmp_path):
    structure = Structure(identity=(0, 2))
    pack = Pack(case, Graphs(tmp_path, case.model, (structure,)))
    found = pack.call(1, BRANCHES, structure, (), range(SAMPLES))
    eager, exact = (
        perturbed_dit(each.model, each.x[1], torch.full((SAMPLES,), TIMES[1]), labels_of(), (0, 2))
        for each in (case, case.exact())
    )
    holds(torch.stack([*found.values()]), torch.stack(eager), torch.stack(exact))


def labels_of():
    return torch.tensor(LABELS)[:, None].expand(2, SAMPLES)


@pytest.mark.parametrize("opset", [21, 23])
def test_what_attention_tokens_receive_is_kept_by_rows_that_tell(case, tmp_path, opset):
    """The same numbers as the engine's listener: mean over heads of what all queries look at."""
    row = [*every(keep, ("kv",)), ("received", (1, 2), Action.COMPUTE, 0, (), BRANCHES)]
    pack = Pack(case, Graphs(tmp_path, case.model, structures_of([row]), opset=opset))
    pack.run([row])
    values = {}
    for each in (case, case.exact()):
        memory = Memory([row])
        each.eager(0, memory.turns(row))
        values[each] = [
            slab.values[list(lanes), 0]
            for branch in BRANCHES
            for (cell, _), (slab, lanes) in memory.kept.places.items()
            if cell.site == "received" and cell.branch == branch
        ]
    eager, exact = (torch.stack(each) for each in values.values())
    holds(torch.stack([torch.from_numpy(pack.kept["kept", "received.1", 0, name]) for name in BRANCHES]), eager, exact)
    assert torch.allclose(exact.sum(-1), torch.tensor(15.0, dtype=exact.dtype))


@pytest.mark.parametrize("name", ["halves", "residual", "block"])
def test_rows_of_opset_23_run_the_standard_attention(case, tmp_path, name):
    graphs = Graphs(tmp_path, case.model, structures_of(ROWS[name]), opset=23)
    kinds = [node.op_type for graph in graphs.made for node in graph.model.graph.node]
    assert "Attention" in kinds and "Softmax" not in kinds
    found = Pack(case, graphs).run(ROWS[name])
    holds(found, case.run("eager", ROWS[name]), case.exact().run("eager", ROWS[name]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["halves", "residual", "block"])
def test_narrow_rows_err_no_more_than_twice_the_eager_oracle_in_that_dtype(tiny, tmp_path, name, dtype):
    case = Case(tiny, getattr(torch, dtype))
    found = Pack(case, Graphs(tmp_path, case.model, structures_of(ROWS[name]), dtype)).run(ROWS[name])
    holds(found, case.run("eager", ROWS[name]), case.exact().run("eager", ROWS[name]))
