"""Goldens are held row by row: what holds, what deviates and from where on, what cannot be verified."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import vivace
from tests.runtime.signed import manifest_of, sign
from tests.runtime.tiny_pipe import plan_of, tiny_pipe
from vivace.errors import PackError
from vivace.export import export_onnx
from vivace.runtime import open_pack, verify_pack
from vivace.runtime.manifest import GOLDENS
from vivace.runtime.verify import _encoding, relative_error


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    pipe = tiny_pipe(folder / "tiny")
    plan = vivace.passes.apply_tokens(plan_of(pipe, steps=6), keep=0.5, first=2)
    export_onnx(pipe, plan, folder / "pack")
    return folder / "pack"


@pytest.fixture(scope="module")
def made_narrow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    pipe = tiny_pipe(folder / "tiny")
    plan = vivace.passes.apply_tokens(plan_of(pipe, steps=6), keep=0.5, first=2)
    export_onnx(pipe, plan, folder / "pack", dtype="float16")
    return folder / "pack"


@pytest.fixture
def pack(made, tmp_path):
    return shutil.copytree(made, tmp_path / "pack")


def changed(pack, **arrays):
    """The pack with other goldens, signed; a value of None takes one out."""
    request = json.loads(manifest_request(pack))
    goldens = load_file(pack / GOLDENS) | arrays
    goldens = {name: np.ascontiguousarray(array) for name, array in goldens.items() if array is not None}
    save_file(goldens, pack / GOLDENS, {"request": json.dumps(request)})
    sign(pack)
    return open_pack(pack)


def manifest_request(pack):
    with safe_open(pack / GOLDENS, "numpy") as file:
        return file.metadata()["request"]


def test_a_pack_holds_where_it_was_made(made):
    found = verify_pack(open_pack(made), threads=1)
    assert found.holds and found.first is None and found.noise and len(found.rows) == 6
    assert 0 < found.error == max(found.rows) <= found.tolerance == 1e-4
    assert found.levels is not None and found.levels <= found.levels_allowed == 1
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["holds"] and data["first_deviating_row"] is None and data["max_error"] == found.error
    assert str(found).splitlines()[-1].startswith("holds: ") and "row   5" in str(found)


def test_a_loaded_session_may_be_verified(made):
    session = open_pack(made).session(threads=1)
    assert verify_pack(session.pack, session=session).holds


def test_the_first_row_that_deviates_is_named(pack):
    row = load_file(pack / GOLDENS)["row.3"]
    found = verify_pack(changed(pack, **{"row.3": row * 1.001}), threads=1)
    assert not found.holds and found.first == 3 and 5e-4 < found.rows[3] < 2e-3
    assert "row   3" in str(found).splitlines()[3] and "the first beyond" in str(found).splitlines()[3]
    assert str(found).splitlines()[-1].startswith("DEVIATES")


def test_rows_that_are_not_finite_deviate(pack):
    row = load_file(pack / GOLDENS)["row.0"]
    row[0, 0, 0, 0] = np.nan
    found = verify_pack(changed(pack, **{"row.0": row}), threads=1)
    assert found.first == 0 and math.isinf(found.error) and found.to_dict()["max_error"] is None


def test_other_noise_deviates_although_rows_hold(pack):
    noise = load_file(pack / GOLDENS)["noise"]
    noise[1, 2, 7, 7] = np.nextafter(noise[1, 2, 7, 7], np.float32(9))
    found = verify_pack(changed(pack, noise=noise), threads=1)
    assert not found.noise and not found.holds and found.first is None
    assert "noise: other numbers" in str(found)


def test_pictures_are_decoded_from_the_golden_latents(pack):
    pictures = load_file(pack / GOLDENS)["pictures"]
    found = verify_pack(changed(pack, pictures=pictures ^ 2), threads=1)
    assert found.levels == 2 and not found.holds and found.first is None


@pytest.mark.parametrize("name", ["row.4", "noise", "latents"])
def test_a_pack_without_goldens_cannot_be_verified(pack, name):
    with pytest.raises(PackError, match=f"goldens.safetensors holds no '{name}'"):
        verify_pack(changed(pack, **{name: None}), threads=1)


def test_goldens_of_another_model_are_an_infinite_error(pack):
    found = verify_pack(changed(pack, **{"row.2": np.zeros((2, 3, 4, 4), np.float32)}), threads=1)
    assert found.first == 2 and math.isinf(found.rows[2])


def test_the_tolerance_is_the_manifests(made):
    assert manifest_of(made)["tolerance"] == verify_pack(open_pack(made), threads=1).tolerance


def test_rows_in_narrow_numbers_start_where_the_goldens_say(made_narrow, tmp_path):
    found = verify_pack(open_pack(made_narrow), threads=1)
    assert found.apart and found.holds and "each row starts where the goldens say" in str(found)
    pack = shutil.copytree(made_narrow, tmp_path / "pack")
    row = load_file(pack / GOLDENS)["row.2"]
    shifted = verify_pack(changed(pack, **{"row.2": row * 1.5}), threads=1)
    assert shifted.first == 2
    assert shifted.rows[:2] == found.rows[:2] and shifted.rows[3] != found.rows[3]


def test_rows_in_narrow_numbers_compute_the_tokens_that_the_goldens_name(made_narrow, tmp_path):
    pack = shutil.copytree(made_narrow, tmp_path / "pack")
    ids = load_file(pack / GOLDENS)["row.3.tokens"]
    others = np.stack([np.setdiff1d(np.arange(16), row) for row in ids]).astype(ids.dtype)
    found = verify_pack(changed(pack, **{"row.3.tokens": others}), threads=1)
    assert found.first == 3


@pytest.mark.parametrize(
    ("name", "array"),
    [("row.3.tokens", np.full((2, 8), 99, np.int32)), ("row.3.tokens", np.zeros((2, 3), np.int32)),
     ("row.2", np.zeros((2, 3, 4, 4), np.float32)), ("row.1.m0", np.zeros(3, np.float32))],
)  # fmt: skip
def test_goldens_that_no_row_can_start_from_are_a_pack_error(made_narrow, tmp_path, name, array):
    pack = shutil.copytree(made_narrow, tmp_path / "pack")
    with pytest.raises(PackError, match=f"goldens.safetensors: {name} has shape"):
        verify_pack(changed(pack, **{name: array}), threads=1)


def test_rows_in_float32_follow_each_other(made):
    assert not verify_pack(open_pack(made), threads=1).apart


def test_tensors_that_encoders_make_of_the_prompt_are_held_to_the_goldens(made):
    wanted = {"cond.text": np.ones((1, 3), np.float32), "uncond.text": np.zeros((1, 3), np.float32)}
    made_of = {"cond": {"text": np.float32([1, 1, 1.5])}, "uncond": {"text": np.zeros(3, np.float32)}}
    session = SimpleNamespace(graphs=SimpleNamespace(encode=[1]), prompts=lambda _: SimpleNamespace(tensors=made_of))
    assert _encoding(session, "red heart", wanted) == 0.5
    assert math.isinf(_encoding(session, "red heart", wanted | {"cond.pooled": np.ones((1, 2), np.float32)}))
    found = verify_pack(open_pack(made), threads=1)
    assert found.encoding is None and not replace(found, encoding=0.5).holds
    assert "prompt: error 5.00e-01" in str(replace(found, encoding=0.5))


def test_errors_are_relative_to_the_largest_number():
    wanted = np.array([1.0, -4.0], np.float32)
    assert relative_error(np.array([1.0, -3.0], np.float32), wanted) == 0.25
    assert relative_error(wanted, np.zeros(2, np.float32)) > 1e29
    assert relative_error(np.zeros(2), np.zeros(2)) == 0.0
