"""Random damage: a pack opens or is one PackError, whatever was flipped, cut or put in, and whoever signed it."""

import random
import shutil
from copy import deepcopy

import pytest

from tests.runtime.signed import manifest_of, sign, write_manifest
from tests.runtime.tiny_pack import write_tiny
from vivace.errors import PackError
from vivace.runtime.graph_file import read_graph
from vivace.runtime.manifest_io import decode
from vivace.runtime.pack import open_pack

FILES = ["manifest.json", "plan.json", "weights.bin", "row-0.onnx", "row-1.onnx", "decode.onnx", "goldens.safetensors"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("packs") / "pack"
    write_tiny(out)
    return out


@pytest.fixture
def pack(made, tmp_path):
    return shutil.copytree(made, tmp_path / "pack")


def damaged(raw, chance):
    """The bytes with one to three of: a bit flipped, a byte put in or taken out, a stretch cut or doubled."""
    raw = bytearray(raw)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(raw) + 1)
        match chance.randrange(5):
            case 0 if at < len(raw):
                raw[at] ^= 1 << chance.randrange(8)
            case 1:
                raw[at:at] = bytes([chance.choice((0, 0xFF, 0x80, 0x7F, chance.randrange(256)))])
            case 2:
                del raw[at : at + chance.randint(1, 8)]
            case 3:
                del raw[at:]
            case _:
                raw[at:at] = raw[at : at + chance.randint(1, 64)]
    return bytes(raw)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_or_cut_file_is_noticed(pack, name):
    raw = (pack / name).read_bytes()
    chance = random.Random(name)
    for _ in range(40):
        changed = damaged(raw, chance)
        if changed == raw:
            continue
        (pack / name).write_bytes(changed)
        with pytest.raises(PackError, match=name):
            open_pack(pack)
    for size in {0, 1, len(raw) // 2, len(raw) - 1}:
        (pack / name).write_bytes(raw[:size])
        with pytest.raises(PackError, match=name):
            open_pack(pack)


@pytest.mark.parametrize("name", FILES[1:])
def test_signed_damage_opens_or_is_one_pack_error(pack, name):
    raw = (pack / name).read_bytes()
    chance = random.Random(name)
    refused = 0
    for _ in range(50):
        (pack / name).write_bytes(damaged(raw, chance))
        sign(pack)
        try:
            open_pack(pack).goldens()
        except PackError:
            refused += 1
    assert refused > (0 if name == "weights.bin" else 10)


def test_any_bytes_are_a_graph_or_a_pack_error(made):
    chance = random.Random(3)
    raws = [(made / name).read_bytes() for name in ("row-0.onnx", "row-1.onnx", "decode.onnx")]
    for n in range(6000):
        raw = damaged(raws[n % 3], chance) if n % 4 else chance.randbytes(chance.randrange(64))
        try:
            read_graph(raw, 4096)
        except PackError:
            pass


VALUES = [None, True, -1, 1 << 70, 0.5, "", "x" * 3000, "../x", "a\x00", [], [[]], {}, {"a": {}}, ["rows"]]


def places(value, path=()):
    """Every place within JSON data."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def test_any_value_in_any_field_of_a_signed_manifest_is_read_or_a_pack_error(pack):
    refused, whole = 0, manifest_of(pack)
    where = [path for path in places(whole) if path and path[0] != "sha256"]
    for n, path in enumerate(where):
        data = target = deepcopy(whole)
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = VALUES[n % len(VALUES)]
        write_manifest(pack, data)
        try:
            open_pack(pack, check=False)
        except PackError:
            refused += 1
    assert refused > len(where) / 2


def test_any_bytes_are_a_manifest_or_a_pack_error(made):
    raw, chance = (made / "manifest.json").read_bytes(), random.Random(5)
    for _ in range(2000):
        changed = damaged(raw, chance)
        if changed != raw:
            with pytest.raises(PackError):
                decode(changed)
