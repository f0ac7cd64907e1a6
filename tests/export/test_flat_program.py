"""The flat program of a pack: read by a few lines of numpy it is the loop of the runtime."""

import numpy as np
import pytest

import vivace
from tests.export.flat_runs import Reader, cached_pack
from vivace.engine.passes import apply_guards, apply_tokens
from vivace.errors import UnsupportedError
from vivace.export.flat_program import flat_program


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return cached_pack(tmp_path_factory.mktemp("flat"))


def test_a_pack_has_its_loop_as_a_flat_program_that_gives_the_same_latents(pack):
    text = (pack.path / "program.txt").read_text()
    wanted = pack.session(threads=1)(7, n=2, seed=11).latents
    found = Reader(pack.path.joinpath, 2, 7, 11).run(text)
    assert np.abs(found - wanted).max() <= pack.manifest.tolerance * np.abs(wanted).max()
    assert "kept.attn.0.0.1" in text and " stack " in text


def test_other_guidance_is_another_program(pack):
    text = flat_program(pack.plan, pack.manifest.graphs, pack.manifest.prompts, {"guidance_scale": 3.5})
    wanted = pack.session(threads=1)(7, seed=1, guidance_scale=3.5).latents
    found = Reader(pack.path.joinpath, 1, 7, 1).run(text)
    assert np.abs(found - wanted).max() <= pack.manifest.tolerance * np.abs(wanted).max()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda plan: apply_guards(plan, "first_block_cache", threshold=0.1), "guards"),
        (lambda plan: apply_tokens(plan, 0.5, first=2), "rows of some tokens"),
    ],
    ids=["guards", "tokens"],
)
def test_what_a_flat_list_cannot_say_is_named(pack, change, message):
    pipe = vivace.load("emoji")
    plan = change(vivace.make_plan(pipe.spec.schedule, "euler", 6, prediction=pipe.spec.prediction)).bind(pipe.spec)
    with pytest.raises(UnsupportedError, match=f"the plan has {message}.*vivace.runtime"):
        flat_program(plan, pack.manifest.graphs, pack.manifest.prompts)
