"""Damaged, edited and invented files: each is refused with one line that names the file, or reads back unchanged."""

import json
import os
import random
from hashlib import sha256

import pytest
from tests.models.quantized.made import same, weights

from vivace.errors import ModelError
from vivace.models.quantized.weights import QuantizedWeights

ODD = (None, True, False, 0, -1, 1.5, 1e300, 10**400, "", "x", "../x", "a\0b", "x" * 5000, [], [1], [[]], {}, {"x": 1})
TOP = ("format", "version", "numbers", "fingerprint", "tensors", "layers", "edges", "kept", "advice", "source")
PLACES = (
    *((name,) for name in TOP),
    *(("tensors", name) for name in ("bytes", "sha256")),
    *(("layers", "blocks.0.qkv", *rest) for rest in ((), ("shape",), ("smooth",), ("static",))),
    ("kept", "blocks.0.up"),
)
MAY_VARY = ("advice", "source", "kept", "fingerprint")  # whose values mean nothing to the reader
ANY_OBJECT = ("source", "advice", "kept")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    weights().save(folder / "w")
    return (folder / "w.json").read_bytes(), (folder / "w.safetensors").read_bytes()


@pytest.fixture
def reads(tmp_path):
    """Write two files (None: absent) and read them: the weights, or None where they were refused in one clear line."""

    def read(text, tensors):
        for name, raw in (("w.json", text), ("w.safetensors", tensors)):
            path = tmp_path / name
            path.unlink(missing_ok=True)
            if raw is not None:
                path.write_bytes(raw)
        try:
            return QuantizedWeights.load(tmp_path / "w")
        except ModelError as error:
            message = str(error)
            assert str(tmp_path / "w.") in message and "\n" not in message and len(message) < 600, message
            return None

    return read


def with_hash(data, tensors):
    """The description of other tensors: nothing but what the header says can give them away."""
    data["tensors"] = {"bytes": len(tensors), "sha256": sha256(tensors).hexdigest()}
    return sealed(data)


def sealed(data):
    """A description with the SHA-256 of what it says now, so that its fields alone can give it away."""
    rest = {name: value for name, value in data.items() if name != "sha256"}
    try:
        digest = sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    except (TypeError, ValueError):
        digest = ""
    return json.dumps({**data, "sha256": digest}).encode()


def place(data, path):
    for name in path[:-1]:
        data = data[name]
    return data, path[-1]


@pytest.mark.parametrize("path", PLACES, ids=".".join)
def test_fields_of_another_type_or_value(good, reads, path):
    text, tensors = good
    original = json.loads(text)
    for value in ODD:
        data = json.loads(text)
        into, name = place(data, path)
        if type(into[name]) is type(value) and into[name] == value:
            continue
        into[name] = value
        assert reads(json.dumps(data).encode(), tensors) is None
        found = reads(sealed(data), tensors)
        if found is not None:
            assert path[0] in MAY_VARY, (path, value)
            assert isinstance(value, dict if path == path[:1] and path[0] in ANY_OBJECT else str)
    del place(original, path)[0][path[-1]]
    assert reads(json.dumps(original).encode(), tensors) is None
    found = reads(sealed(original), tensors)
    assert found is None or path == ("kept", "blocks.0.up")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(more=1),
        lambda data: data["layers"]["blocks.0.out"].update(scale=1.0),
        lambda data: data["tensors"].update(file="/etc/passwd"),
        lambda data: data["layers"].pop("blocks.0.out"),
        lambda data: data["layers"].update({"blocks.0.up": data["layers"]["blocks.0.out"]}),
        lambda data: data["layers"].update({"blocks.1.out": data["layers"].pop("blocks.0.out")}),
        lambda data: data["layers"]["blocks.0.out"].update(shape=[2, 8]),
        lambda data: data["layers"]["blocks.0.out"].update(shape=[4, 4, 1]),
        lambda data: data["layers"]["blocks.0.out"].update(shape=[4.0, 4]),
        lambda data: data["layers"]["blocks.0.out"].update(shape=[1 << 40, 4]),
        lambda data: data["layers"]["blocks.0.out"].update(static=True),
        lambda data: data["layers"]["blocks.0.qkv"].update(smooth=False),
        lambda data: data.update(numbers="fp8"),
        lambda data: data.update(numbers="int4"),
        lambda data: data.update(edges=[1.0]),
        lambda data: data.update(edges=[500.5, 250.0]),
        lambda data: data.update(edges=[250.0, 250.0]),
        lambda data: data.update(edges=["250", "500"]),
        lambda data: data.update(version=2),
        lambda data: data.update(version=1.0),
        lambda data: data.update(version=True),
    ],
)
def test_descriptions_that_do_not_fit_the_tensors(good, reads, change):
    text, tensors = good
    data = json.loads(text)
    change(data)
    assert reads(json.dumps(data).encode(), tensors) is None
    assert reads(sealed(data), tensors) is None


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"",
        b"null",
        b"[]",
        b"\x80\x04\x95pickle",
        b"\xff\xfe{}",
        b'{"format": NaN}',
        b'{"format": 1e999}',
        b"[" * 100_000,
        b'{"a":' * 20_000,
        b'{"format": 1, "format": 1}',
        b'{"n": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda raw: repr(raw)[:16],
)
def test_descriptions_that_are_none(good, reads, text):
    assert reads(text, good[1]) is None


def test_descriptions_of_any_depth(good, reads):
    text, tensors = good
    for depth in (100, 500, 900, 980, 20_000):
        raw = text.replace(b'"source": {', b'"source": {"x": ' + b"[" * depth + b"]" * depth + b", ", 1)
        assert raw != text and reads(raw, tensors) is None


def header_of(tensors):
    length = int.from_bytes(tensors[:8], "little")
    return json.loads(tensors[8 : 8 + length]), tensors[8 + length :]


def with_header(header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(dtype="F32"),
        lambda entry: entry.update(dtype="U8"),
        lambda entry: entry.update(dtype="Q4"),
        lambda entry: entry.update(dtype=None),
        lambda entry: entry.update(shape=[48]),
        lambda entry: entry.update(shape=[4, 12]),
        lambda entry: entry.update(shape=[1 << 62, 1 << 62]),
        lambda entry: entry.update(shape=[-12, -4]),
        lambda entry: entry.update(shape="12"),
        lambda entry: entry.update(data_offsets=[0, 1 << 60]),
        lambda entry: entry.update(data_offsets=[48, 0]),
        lambda entry: entry.update(data_offsets=[0, 0]),
        lambda entry: entry.update(data_offsets=None),
        lambda entry: entry.clear(),
    ],
)
def test_headers_that_lie_under_a_right_hash(good, reads, change):
    text, tensors = good
    header, data = header_of(tensors)
    change(header["blocks.0.qkv.weight"])
    made = with_header(header, data)
    assert reads(with_hash(json.loads(text), made), made) is None


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b"null", b"{}", b'{"x": 1}', b'{"x": NaN}', b"[" * 5000, b"\xff" * 16, b'{"x":{},"x":{}}'],
)
def test_headers_that_are_none(good, reads, header):
    text, tensors = good
    made = with_header(header, header_of(tensors)[1])
    assert reads(with_hash(json.loads(text), made), made) is None


def test_scales_that_are_no_scales(good, reads):
    text, tensors = good
    header, data = header_of(tensors)
    for name in (
        "blocks.0.qkv.weight_scale",
        "blocks.0.qkv.smooth",
        "blocks.0.qkv.x_scale",
        "blocks.0.out.weight_scale",
    ):
        begin, _ = header[name]["data_offsets"]
        for number in ("0000c07f", "0000807f", "00000000", "000080bf"):  # NaN, infinity, 0, -1
            made = with_header(header, data[:begin] + bytes.fromhex(number) + data[begin + 4 :])
            assert reads(with_hash(json.loads(text), made), made) is None


def test_tensor_files_of_another_length(good, reads):
    text, tensors = good
    for count in (0, 1, 7, 8, 9, 100, len(tensors) // 2, len(tensors) - 1):
        assert reads(text, tensors[:count]) is None
        assert reads(with_hash(json.loads(text), tensors[:count]), tensors[:count]) is None
    for more in (b"\0", b"\0" * 4096, tensors):
        assert reads(text, tensors + more) is None
        assert reads(with_hash(json.loads(text), tensors + more), tensors + more) is None
    for length in (0, 1, len(tensors), 1 << 40, (1 << 64) - 1):
        made = length.to_bytes(8, "little") + tensors[8:]
        assert reads(with_hash(json.loads(text), made), made) is None
    assert reads(text, None) is None and reads(None, tensors) is None


def test_any_byte_of_the_tensors_counts(good, reads):
    text, tensors = good
    for at in range(0, len(tensors), 7):
        changed = bytearray(tensors)
        changed[at] ^= 1 << at % 8
        assert reads(text, bytes(changed)) is None


def test_random_damage_never_gets_through_unseen(good, reads):
    text, tensors = good
    rng = random.Random(0)
    for _ in range(400):
        raw = bytearray(rng.choice((text, tensors)))
        which = 0 if raw == text else 1
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw))
            match rng.randrange(4):
                case 0:
                    raw[at] = rng.randrange(256)
                case 1:
                    del raw[at : at + rng.randint(1, 9)]
                case 2:
                    raw[at:at] = bytes(rng.choices(b'0{}[],:"\\ex-', k=rng.randint(1, 4)))
                case _:
                    raw[at:at] = raw[max(0, at - 20) : at]
        pair = [text, tensors]
        pair[which] = bytes(raw)
        found = reads(*pair)
        assert found is None or (which == 0 and same(found, weights()))  # the latter: damage in blanks
    assert same(reads(text, tensors), weights())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no os.mkfifo; run on Linux or macOS")
def test_pipes_folders_and_devices_are_no_files(good, tmp_path):
    os.mkfifo(tmp_path / "p.json")
    (tmp_path / "d.json").mkdir()
    os.symlink("/dev/zero", tmp_path / "z.json")
    (tmp_path / "t.json").write_bytes(good[0])
    os.mkfifo(tmp_path / "t.safetensors")
    for name in ("p", "d", "z", "t", "a\0b"):
        with pytest.raises(ModelError):
            QuantizedWeights.load(tmp_path / name)
