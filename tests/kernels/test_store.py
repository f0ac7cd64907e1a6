"""The store of what was measured: whole values whatever other processes do, and nothing raised for a bad disk."""

import json
import subprocess
import sys

import pytest

from vivace.errors import ArgumentError
from vivace.kernels import store

KEY = {"what": "tile", "shape": [64, 1152, 1152], "device": "any"}


def test_a_value_comes_back_from_another_process(tmp_path):
    assert store.get(KEY, folder=tmp_path) == store.Found(None, "nothing is kept")
    assert store.put(KEY, {"tile": [128, 64]}, folder=tmp_path) is None
    code = "import json, sys; from pathlib import Path; from vivace.kernels import store\n"
    code += "print(json.dumps(store.get(json.loads(sys.argv[2]), folder=Path(sys.argv[1])).value))"
    same = json.dumps(dict(reversed(KEY.items())))  # the order of a key's fields means nothing
    out = subprocess.run([sys.executable, "-c", code, tmp_path, same], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == {"tile": [128, 64]}


WRITER = """
import sys
from pathlib import Path
from vivace.kernels import store
for i in range(300):
    assert store.put("key", [int(sys.argv[2])] * 2000, folder=Path(sys.argv[1])) is None
"""


def test_two_writers_never_leave_half_a_value(tmp_path):
    assert store.put("key", [0] * 2000, folder=tmp_path) is None
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(i)]) for i in (1, 2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        found = store.get("key", folder=tmp_path)
        assert found.value is not None and len(set(found.value)) == 1 and len(found.value) == 2000, found.reason
        seen.add(found.value[0])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {0, 1, 2} and store.get("key", folder=tmp_path).value[0] in (1, 2)
    assert [path.name for path in tmp_path.iterdir()] == [store.path_of("key", tmp_path).name]


@pytest.mark.parametrize("damage", [b"", b'{"key": "key", "val', b"\xff\xfe", b"[1]", b'{"key": "other", "value": 1}'])
def test_a_damaged_file_counts_as_absent_and_is_replaced(tmp_path, damage):
    store.path_of("key", tmp_path).write_bytes(damage)
    found = store.get("key", folder=tmp_path)
    assert found.value is None and ("damaged" in found.reason)
    assert store.put("key", 1, folder=tmp_path) is None and store.get("key", folder=tmp_path).value == 1


def test_a_place_that_cannot_be_used_is_told_and_not_raised(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in store.put("key", 1, folder=tmp_path / "file" / "store")
    store.path_of("key", tmp_path).mkdir()
    assert "cannot be read" in store.get("key", folder=tmp_path).reason
    assert "cannot be written" in store.put("key", 1, folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"file", store.path_of("key", tmp_path).name}


@pytest.mark.parametrize("wrong", [{1, 2}, float("nan"), object()])
def test_what_is_no_json_is_refused(tmp_path, wrong):
    with pytest.raises(ArgumentError, match="is no JSON"):
        store.put("key", wrong, folder=tmp_path)
    with pytest.raises(ArgumentError, match="is no JSON"):
        store.get(wrong, folder=tmp_path)


def test_the_store_lies_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.put("key", 1) is None and store.get("key").value == 1
    assert store.path_of("key").parent == tmp_path / "vivace" / "store"
    for relative in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert store.default_folder().parts[-3:] == (".cache", "vivace", "store")
