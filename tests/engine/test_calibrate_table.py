"""Calibration tables: one file, whole or not at all, of one model."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from vivace.engine.calibrate.packing import pack, unpack
from vivace.engine.calibrate.table import CalibrationTable
from vivace.errors import ArgumentError, ModelError, OutputError


def table(**changes):
    arrays = {"a.maxima": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 3), np.float16)}
    arrays |= {"t": np.array([999.0, 0.5]), "flag": np.array([True, False]), "none": np.array(3, np.int64)}
    given = {"kind": "quantization", "fingerprint": "f" * 64, "arrays": arrays, "metadata": {"seed": 3, "edges": [0.5]}}
    return CalibrationTable(**(given | changes))


def edited(path, **changes):
    """The file with other metadata."""
    with safe_open(path, framework="np") as file:
        entries, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    save_file(arrays, path, metadata={**entries, **changes})


def test_a_table_reads_back_the_same(tmp_path):
    path, kept = tmp_path / "t.safetensors", table()
    kept.save(path)
    again = CalibrationTable.load(path)
    assert (again.kind, again.fingerprint, again.metadata) == (kept.kind, kept.fingerprint, kept.metadata)
    assert again.hash == kept.hash and again.arrays.keys() == kept.arrays.keys()
    for name, array in kept.arrays.items():
        assert again.arrays[name].dtype == array.dtype and np.array_equal(again.arrays[name], array)


def test_the_hash_covers_names_shapes_bytes_and_description():
    base = table()
    moved = {**base.arrays, "t": base.arrays["t"][::-1].copy()}
    reshaped = {**base.arrays, "a.maxima": base.arrays["a.maxima"].reshape(3, 2)}
    others = [table(arrays=moved), table(arrays=reshaped), table(metadata={"seed": 4}), table(kind="caching")]
    assert len({base.hash, *(other.hash for other in others)}) == 5
    assert table().hash == base.hash


def test_another_model_and_another_kind_are_refused_by_one_sentence():
    with pytest.raises(
        ModelError, match=r"made for model ffffffffffff, this one is 000000000000.*calibrate this model"
    ):
        table().check("quantization", "0" * 64)
    with pytest.raises(ModelError, match="for quantization, not for caching"):
        table().check("caching", "f" * 64)
    table().check("quantization", "f" * 64)


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    table().save(path)
    whole = path.read_bytes()
    for size in (0, 7, 8, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"t\.safetensors: .*calibrate again"):
            CalibrationTable.load(path)


def test_one_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "t.safetensors"
    table().save(path)
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ModelError, match="SHA-256"):
        CalibrationTable.load(path)


def test_edited_descriptions_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    data = {"kind": "quantization", "fingerprint": "f" * 64, "metadata": {"seed": 3, "edges": [0.5]}}
    for changes, message in (
        ({"format": "other"}, "no calibration table"),
        ({"version": "2"}, "version '2', this release reads 1"),
        ({"description": "{"}, "not JSON"),
        ({"description": "[]"}, "no object"),
        ({"description": json.dumps(data | {"kind": 3})}, "kind is 3"),
        ({"description": json.dumps(data | {"more": 3})}, "no object with"),
        ({"description": json.dumps(data | {"metadata": {"seed": 4}})}, "SHA-256"),
    ):
        table().save(path)
        edited(path, **changes)
        with pytest.raises(ModelError, match=message):
            CalibrationTable.load(path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe", tmp_path / "with\0nul"):
        with pytest.raises(ModelError):
            CalibrationTable.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    table().save(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        table(metadata={"seed": 9}).save(path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_what_a_file_cannot_hold_is_refused_when_the_table_is_made():
    with pytest.raises(ArgumentError, match="complex"):
        table(arrays={"a": np.zeros(2, np.complex64)})
    with pytest.raises(ArgumentError, match="no name"):
        table(arrays={"a\nb": np.zeros(2)})
    for metadata in ({"x": float("nan")}, {"x": (1, 2)}, {1: 2}, {"x": np.float32(1)}):
        with pytest.raises(ArgumentError, match="metadata"):
            table(metadata=metadata)


def test_prompts_of_every_kind_come_back():
    prompts = [
        "a cat",
        7,
        None,
        {"cond": {"embeds": torch.ones(1, 2), "pair": [torch.zeros(1, dtype=torch.bfloat16), 3]}},
    ]
    arrays = {}
    data = pack(prompts, "prompts", arrays)
    again = unpack(json.loads(json.dumps(data)), arrays)
    assert again[:3] == prompts[:3]
    inner, given = again[3]["cond"], prompts[3]["cond"]
    assert torch.equal(inner["embeds"], given["embeds"]) and inner["pair"][1] == 3
    assert inner["pair"][0].dtype == torch.bfloat16 and torch.equal(inner["pair"][0], given["pair"][0])
    with pytest.raises(ArgumentError, match="set cannot be kept"):
        pack([{1, 2}], "prompts", {})
