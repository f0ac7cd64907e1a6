"""Hostile plan files: one clear error each, no crash, nothing written, in bounded time and memory."""

import json
import os
import resource
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engine import hostile
from tests.engine.plans import edit, euler, guided_row, plan_of
from vivace.bench import fuzz_plans
from vivace.engine.plan import Action, Affine, Args, Guard, Plan, Recipe, Rule, Step, TensorRef, Variant
from vivace.engine.plan_codec import MAX_DEPTH, decode, parse
from vivace.engine.plan_io import MAX_BYTES, SIDE_CAR, canonical, tensor_infos
from vivace.errors import OutputError, PlanError, PlanFileError

CORPUS = hostile.CORPUS
FILES = sorted(path.stem for path in CORPUS.glob("*.json"))
MEBI = 1 << 20


def refusal(path):
    """The one clear error of a file: one line, the file's name, a bounded length."""
    with pytest.raises((PlanError, OutputError)) as caught:
        Plan.load(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000, message
    return message


HANG = 30  # seconds of processor time: several times what a loaded machine needs, far below what a runaway takes


def bounded(call):
    """Result of `call`, which must neither hang nor take more than a few MiB."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        return call()
    finally:
        seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seconds < HANG and peak < 32 * MEBI, (seconds, peak)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("legal_")])
def test_a_hostile_file_gets_one_clear_error(name):
    before = sorted(os.listdir(CORPUS))
    assert f"{name}.json" in bounded(lambda: refusal(CORPUS / f"{name}.json"))
    assert sorted(os.listdir(CORPUS)) == before


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("legal_")])
def test_an_odd_but_legal_file_loads(name, tmp_path):
    plan = Plan.load(CORPUS / f"{name}.json")
    plan.save(tmp_path / "plan.json")
    assert canonical(Plan.load(tmp_path / "plan.json")) == canonical(plan)


def test_the_corpus_is_what_its_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(hostile, "CORPUS", tmp_path)
    hostile.main()
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(CORPUS))
    assert all((CORPUS / path.name).read_bytes() == path.read_bytes() for path in tmp_path.iterdir())


# --- what git cannot hold --------------------------------------------------------------------------------------------
def tensor_files(folder):
    """A good plan with its side-car in `folder`."""
    (folder / "plan.json").write_text(hostile.tensor_plan())
    (folder / f"plan{SIDE_CAR}").write_bytes(hostile.side_car())
    return folder / "plan.json", folder / f"plan{SIDE_CAR}"


@pytest.mark.parametrize("which", [0, 1])
def test_a_directory_pipe_or_device_is_no_file(which, tmp_path):
    victim = tensor_files(tmp_path)[which]
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)):
        victim.unlink(missing_ok=True) if not victim.is_dir() else victim.rmdir()
        make(victim)
        assert "cannot be read" in bounded(lambda: refusal(tmp_path / "plan.json"))


def test_a_link_to_the_right_bytes_is_a_file(tmp_path):
    path, side_car = tensor_files(tmp_path)
    os.rename(side_car, tmp_path / "blob")
    side_car.symlink_to("blob")
    plan = Plan.load(path)
    plan.save(path)  # replaces the link, not what it points to
    assert not side_car.is_symlink() and (tmp_path / "blob").read_bytes() == hostile.side_car()
    side_car.unlink()
    side_car.symlink_to("/etc/hostname")
    assert "side-car" in refusal(path)


def test_gigabytes_are_refused_unread(tmp_path):
    path, side_car = tensor_files(tmp_path)
    os.truncate(side_car, 50 << 30)  # a hole
    assert "bytes; at most" in bounded(lambda: refusal(path))
    os.truncate(path, 50 << 30)
    assert "bytes; at most" in bounded(lambda: refusal(path))


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "\udcff\ud800", "x" * 300, "none/such.json"])
def test_a_name_that_is_no_file_is_one_line(name, tmp_path):
    refusal(name)
    with pytest.raises(OutputError) as caught:
        euler().save(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1 and os.listdir(tmp_path) == []


def test_a_file_with_an_odd_name_is_one_line_and_works(tmp_path):
    path = tmp_path / "a\nb\u202e.json"
    if "\n" in path.name:
        path.write_text("{")
        assert "a\\nb\\u202e.json" in refusal(path)
        path.unlink()
    (tmp_path / "ünï ✓.json").write_text(canonical(euler()).decode())
    assert Plan.load(tmp_path / "ünï ✓.json") == euler()


@pytest.mark.parametrize("filler", ["[],", "0.5,", '"\\\\\\"",'])
def test_the_largest_file_is_refused_in_bounded_time(filler, tmp_path):
    text = '{"steps":[' + filler * ((MAX_BYTES - 20) // len(filler)) + "0]}"
    (tmp_path / "plan.json").write_text(text)
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(tmp_path / "plan.json")
    assert time.process_time() - begin < HANG
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024 * 1024  # KiB


# --- depth, and time of a long plan ----------------------------------------------------------------------------------
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}"), ('[{"]":', "}]"), ('["\\"",', "]")])
def test_depth_is_counted_outside_strings(opening, closing):
    each = opening.count("[") + opening.count("{")
    fits = MAX_DEPTH // each
    parse((opening * fits + "0" + closing * fits).encode())
    for levels in (fits + 1, 10_000):
        for text in (opening * levels + "0" + closing * levels, opening * levels):
            with pytest.raises(PlanFileError, match="deeper|not JSON" if levels == fits + 1 else "deeper"):
                parse(text.encode())


def test_a_thousand_rows_decode_quickly():
    row = guided_row(variant=Variant("main", ("cond", "uncond"), (Rule((0, 28), action=Action.COMPUTE, order=2),)))
    raw = canonical(plan_of(*[row] * 1000, prediction="eps"))
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        decode(parse(raw))
        seconds.append(time.process_time() - begin)
    assert min(seconds) < HANG / 10


def test_cache_rules_cost_bounded_time():
    rules = tuple(Rule((0, 4096), site, action=Action.COMPUTE) for site in ("block", "attn", "mlp") for _ in range(300))
    plan = plan_of(*(Step(1.0, 0.5, 0.5, (Affine("x", (("out", 1.0),)),), Variant(rules=rules)) for _ in range(100)))
    begin = time.process_time()
    with pytest.raises(PlanError, match="rules name more than"):
        plan.bind(replace(hostile.SPEC, blocks=4096))
    assert time.process_time() - begin < HANG


# --- saving ----------------------------------------------------------------------------------------------------------
def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


NAN = float("nan")
UNWRITABLE = {
    "nan in the recipe": lambda plan: replace(plan, recipe=Recipe("make_plan", Args.of({"a": NAN}))),
    "a surrogate in the recipe": lambda plan: replace(plan, recipe=Recipe("make_plan", Args.of({"a": "\ud800"}))),
    "a deep recipe": lambda plan: replace(plan, recipe=Recipe("m", Args.of({"a": json.loads("[" * 40 + "]" * 40)}))),
    "an integer of 80 bits": lambda plan: replace(plan, recipe=Recipe("m", Args.of({"a": 1 << 80}))),
    "an unknown type": lambda plan: replace(plan, recipe=Recipe("m", Args((("a", object()),)))),
    "nan in a guard": lambda plan: edit(plan, 1, guard=Guard("m", "below", 0.5, Variant(), (NAN,))),
    "nan in a selector": lambda plan: edit(plan, 1, variant=Variant(selector_params=(("a", NAN),))),
    "a model of two lines": lambda plan: edit(plan, 1, variant=Variant("a\nb")),
    "true for an integer": lambda plan: edit(plan, 1, variant=Variant(rules=(Rule((False, True), precision="bf16"),))),
    "more than fits": lambda plan: replace(plan, recipe=Recipe("m", Args.of({"a": "x" * 250 * (MAX_BYTES // 250)}))),
    "tensors without arrays": lambda plan: replace(
        plan, tensors=tensor_infos({"mean": np.ones((3, 2, 2), np.float32)})
    ),
}


@pytest.mark.parametrize("what", UNWRITABLE)
def test_a_plan_that_would_not_load_again_is_not_written(what, tmp_path):
    euler().save(tmp_path / "plan.json")
    before = listing(tmp_path)
    with pytest.raises(PlanError) as caught:
        UNWRITABLE[what](euler()).save(tmp_path / "plan.json")
    assert len(str(caught.value).splitlines()) == 1 and listing(tmp_path) == before


def test_a_place_that_is_a_directory_leaves_the_side_car_alone(tmp_path):
    path, side_car = tensor_files(tmp_path)
    plan = Plan.load(path)
    path.unlink()
    path.mkdir()
    side_car.write_bytes(b"somebody's")
    with pytest.raises(OutputError, match="Is a directory"):
        plan.save(path)
    assert listing(tmp_path) == {side_car.name: b"somebody's"} and os.listdir(path) == []
    with pytest.raises(OutputError, match="name of the side-car"):
        plan.save(tmp_path / f"other{SIDE_CAR}")


def test_a_full_disk_leaves_the_old_plan(tmp_path, monkeypatch):
    path, _ = tensor_files(tmp_path)
    plan, before = Plan.load(path), listing(tmp_path)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        replace(plan, prediction="eps").save(path)
    assert listing(tmp_path) == before


def test_tensors_of_every_dtype_and_odd_layout_round_trip(tmp_path):
    arrays = {
        "a": np.arange(24, dtype=">f4").reshape(2, 3, 4)[:, ::2],
        "b": np.array(-0.0, np.float16).reshape(1, 1),
        "c": np.asfortranarray(np.array([[5e-324, 1.0], [2.0, 3.0]])),
    }
    step = Step(1.0, 0.5, 0.5, (Affine("x", tuple(("x", TensorRef(key)) for key in arrays)),))
    plan = plan_of(step, tensors=tensor_infos(arrays), arrays=arrays)
    plan.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert back == plan and back.hash == plan.hash
    assert all(np.array_equal(back.arrays[key], array) for key, array in arrays.items())


# --- mutations -------------------------------------------------------------------------------------------------------
def test_mutated_files_never_escape_as_another_error():
    """A slice of `python -m vivace.bench.fuzz_plans --count 100000`."""
    report = fuzz_plans.fuzz(seed=0, first=0, last=1000)
    assert report["failures"] == []
    assert report["counts"]["lowered"] > 30 and report["counts"]["refused"] > 500


def test_mutations_are_the_same_everywhere():
    files = fuzz_plans.seeds()
    assert [fuzz_plans.case(3, n, files) for n in range(50)] == [fuzz_plans.case(3, n, files) for n in range(50)]


def test_the_fuzzer_tells_a_failure(monkeypatch, tmp_path):
    def broken(path):
        raise KeyError("x")

    monkeypatch.setattr(fuzz_plans, "load_plan", broken)
    report = fuzz_plans.fuzz(seed=0, first=0, last=2, keep=str(tmp_path))
    assert report["counts"] == {"failed": 2} and "KeyError" in (tmp_path / "0-1" / "error.txt").read_text()
