"""Rows of the native DiT that compute some image tokens, as graphs, against the eager oracle."""

import pytest
import torch

from tests.export.dit_runs import Graphs, Pack, structures_of, tiny_folder_of
from tests.models.caching.rows import Case
from tests.models.caching.test_native_rows import holds
from tests.models.tokens.test_native_rows import BESIDE, ROWS, SOME, STORES, drawn
from vivace.engine.tokens import Focus
from vivace.errors import UnsupportedError
from vivace.runtime.calls import Structure


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tiny_folder_of(tmp_path_factory.mktemp("tiny") / "transformer"), torch.float32)


@pytest.fixture(scope="module")
def pack(case, tmp_path_factory):
    wanted = {}
    for store in (None, *STORES):
        wanted |= dict.fromkeys(structures_of(ROWS, store, (1, 2, 3)))
    for store in (None, "int8", "fp16"):
        for rows in BESIDE.values():
            some = [i for i, (_, part) in enumerate(rows) if part]
            wanted |= dict.fromkeys(structures_of([row for row, _ in rows], store, some))
    return Pack(case, Graphs(tmp_path_factory.mktemp("graphs"), case.model, tuple(wanted)))


def compare(case, pack, rows, ids, store=None):
    eager, exact = case.run("eager", rows, store, ids=ids), case.exact().run("eager", rows, ids=ids)
    holds(pack.run(rows, store, ids=ids), eager, exact)


@pytest.mark.parametrize("store", [None, *STORES])
def test_token_rows_err_no_more_than_twice_the_eager_oracle(case, pack, store):
    compare(case, pack, ROWS, SOME, store)


@pytest.mark.parametrize("store", [None, "int8", "fp16"])
@pytest.mark.parametrize("name", list(BESIDE))
def test_token_rows_with_caches_beside_err_no_more_than_twice_the_eager_oracle(case, pack, name, store):
    rows = [row for row, _ in BESIDE[name]]
    ids = [some if part else None for some, (_, part) in zip(drawn(4, 5, 3, 11), BESIDE[name], strict=True)]
    compare(case, pack, rows, ids, store)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_token_rows_err_no_more_than_twice_the_eager_oracle_in_that_dtype(case, tmp_path, dtype):
    own = Case(tiny_folder_of(tmp_path / "transformer"), getattr(torch, dtype))
    compare(own, Pack(own, Graphs(tmp_path, own.model, structures_of(ROWS, None, (1, 2, 3)), dtype)), ROWS, SOME)


def test_token_rows_of_opset_23_err_no_more_than_twice_the_eager_oracle(case, tmp_path):
    compare(case, Pack(case, Graphs(tmp_path, case.model, structures_of(ROWS, None, (1, 2, 3)), opset=23)), ROWS, SOME)


def test_pixels_of_tokens_that_are_not_computed_are_zero(case, pack):
    found = pack.run(ROWS, ids=SOME)
    for made, ids in zip(found[1:], SOME[1:], strict=True):
        shown = case.shown(Focus(ids, case.tokens)) > 0
        assert torch.equal(made != 0, shown.expand_as(made))


def test_a_token_row_without_kept_keys_is_refused(case, tmp_path):
    with pytest.raises(UnsupportedError, match="block 0 attends in a token row"):
        Graphs(tmp_path, case.model, [Structure(tokens=True)])
