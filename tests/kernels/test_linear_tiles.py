"""Tiles of the Triton linears: one for a whole class of shapes, tuned ones kept, and no choice that changes a bit."""

from dataclasses import astuple

import pytest
import torch

from vivace.errors import ArgumentError, BackendError
from vivace.kernels import spec, store
from vivace.kernels.linear import tiles
from vivace.kernels.linear.tiles import Tile
from vivace.kernels.linear.tune import tune

DEVICE = "NVIDIA H100 80GB HBM3 (9, 0)"


@pytest.fixture(autouse=True)
def empty_store(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles.forget()
    yield
    tiles.forget()


def test_a_class_holds_the_rows_up_to_a_power_of_two():
    assert [tiles.rows_class(rows) for rows in (1, 64, 65, 128, 129, 512, 70_000)] == [
        64,
        64,
        128,
        128,
        256,
        512,
        65536,
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float32"])
def test_all_rows_of_a_class_have_one_tile(dtype):
    for low, high in ((1, 64), (65, 128), (257, 512), (2049, 4096)):
        found = {tiles.tile_of(rows, 1152, 4608, dtype, DEVICE) for rows in (low, low + 3, high)}
        assert len(found) == 1


def programs(tile, rows, columns):
    return -(-rows // tile.rows) * -(-columns // tile.columns)


def test_large_results_take_large_tiles_and_small_ones_fill_the_device():
    assert tiles.table(16384, 4608, "bfloat16") == Tile(128, 256, 64, 8, 3)
    assert tiles.table(64, 1152, "bfloat16").columns == 32
    for rows in (64, 512, 8192):
        for dtype in tiles.TILES:
            assert programs(tiles.table(rows, 4608, dtype), rows, 4608) >= tiles.PROGRAMS // 2
    for rows in (4096, 8192):  # no more than a third of the device idle in the last round
        for columns in (1152, 3456, 4608):
            rounds = programs(tiles.table(rows, columns, "int8"), rows, columns) / tiles.PROGRAMS
            assert rounds / -(-rounds // 1) > 0.66


def test_every_tile_fits_the_shared_memory_of_a_multiprocessor_as_often_as_it_says():
    for dtype in tiles.TILES:
        for tile in tiles.tiles(dtype):
            assert max(1, tile.programs) * (tile.shared(dtype) + 1024) <= 228 << 10, tile


def test_tiles_that_a_device_cannot_hold_are_not_taken():
    assert tiles.table(16384, 4608, "bfloat16", 99 << 10) == Tile(128, 128, 64, 8, 3)
    assert tiles.table(16384, 4608, "int8", 48 << 10) == tiles.tiles("int8")[-1]  # none fits: the smallest
    assert tiles.tile_of(16384, 4608, 1152, "bfloat16", "a smaller one", 99 << 10) == Tile(128, 128, 64, 8, 3)


@pytest.mark.parametrize("dtype", tiles.TILES)
def test_tiles_of_a_dtype_share_depth_and_matrix_instruction(dtype):
    one_sum = dtype == "int8"  # in any order
    assert one_sum or len({tile.depth for tile in tiles.tiles(dtype)}) == 1
    assert all(tile.rows >= 64 and tile.rows * tile.columns >= 32 * tile.warps for tile in tiles.tiles(dtype))


def keep(value, dtype="bfloat16", **other):
    arguments = {"rows": 512, "columns": 1152, "depth": 1152, "dtype": dtype, "device": DEVICE} | other
    return store.put(tiles.key(**arguments, versions=tiles.versions()), value)


def test_a_kept_tile_is_taken_for_its_shape_class_and_device_alone():
    chosen = tiles.tiles("bfloat16")[3]
    assert tiles.table(512, 1152, "bfloat16") != chosen
    assert keep({"tile": list(astuple(chosen))}) is None
    assert tiles.tile_of(300, 1152, 1152, "bfloat16", DEVICE) == chosen
    for rows, columns, dtype, device in (
        (256, 1152, "bfloat16", DEVICE), (300, 1153, "bfloat16", DEVICE), (300, 1152, "float16", DEVICE),
        (300, 1152, "bfloat16", "another"), (300, 1152, "bfloat16", "cpu"),
    ):  # fmt: skip
        assert tiles.tile_of(rows, columns, 1152, dtype, device) != chosen


@pytest.mark.parametrize("value", [None, 3, {}, {"tile": [64, 64]}, {"tile": [64, 64, 8, 4, 5]}, {"tile": "64"}])
def test_a_kept_value_that_is_no_tile_of_today_is_ignored(value):
    assert keep(value) is None
    assert tiles.tile_of(512, 1152, 1152, "bfloat16", DEVICE) == tiles.table(512, 1152, "bfloat16")


@pytest.mark.parametrize("wrong", [(0, 8, 8, "bfloat16"), (8, 8, 0, "int8"), (8, 8, 8, "float64")])
def test_what_has_no_tiles_is_refused(wrong):
    with pytest.raises(ArgumentError, match="tune: "):
        tune(*wrong)


def test_tuning_needs_a_device(monkeypatch):
    monkeypatch.setattr("vivace.kernels.linear.tune.missing", lambda backend: "torch sees no CUDA device")
    with pytest.raises(BackendError, match="tune: torch sees no CUDA device"):
        tune(64, 64, 64)


def on_device(**options):
    """tune here: on the GPU, or in the interpreter with a clock that prefers the last tile."""
    if not spec.interpreted():
        return tune(100, 96, 160, **options)
    ticks = iter(range(100, 0, -1))
    return tune(100, 96, 160, device="cpu", clock=lambda call: (call(), float(next(ticks)))[1], **options)


@pytest.mark.backend("triton")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float8_e4m3fn", "float32"])
def test_triton_tiles_all_have_the_same_bits_and_the_fastest_is_kept(dtype):
    tuned = on_device(dtype=dtype)
    assert not tuned.refused and tuned.not_kept is None
    assert set(tuned.ms) == set(tiles.tiles(dtype)) and tuned.tile == min(tuned.ms, key=tuned.ms.get)
    found = store.get(tiles.key(128, 96, 160, dtype, tuned.device, tiles.versions()))
    assert tiles.kept(found.value, dtype) == tuned.tile
    assert tuned.to_dict()["shape"] == [128, 96, 160]


@pytest.mark.backend("triton")
def test_triton_tiles_that_change_bits_or_cannot_run_are_refused(monkeypatch):
    from vivace.kernels.linear import triton_impl

    launch = triton_impl.launch
    first, second = tiles.tiles("bfloat16")[:2]

    def odd_launch(tile, *arguments):
        if tile == first:
            raise RuntimeError("out of resource: shared memory")
        result = launch(tile, *arguments)
        return result.add_(1.0) if tile == second else result

    monkeypatch.setattr(triton_impl, "launch", odd_launch)
    tuned = on_device(dtype="bfloat16")
    assert tuned.refused == {first: "RuntimeError: out of resource: shared memory", second: "changes bits"}
    assert tuned.tile not in (first, second)


@pytest.mark.backend("triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_gives_a_row_the_same_bits_in_every_shape_class(dtype):
    from vivace.kernels.linear import linear

    device = "cpu" if spec.interpreted() else "cuda"
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(size, 80, generator=generator).to(device, dtype) for size in (300, 70))
    whole = linear(x, weight, activation="silu", backend="triton")
    for rows in (1, 5, 64, 65, 130):
        assert torch.equal(linear(x[:rows], weight, activation="silu", backend="triton"), whole[:rows])


@pytest.mark.backend("triton")
def test_triton_refuses_a_packed_weight():
    from vivace.kernels.linear import linear, pack_weight

    device = "cpu" if spec.interpreted() else "cuda"
    with pytest.raises(ArgumentError, match="packed weight is for the CPU|weight is on cpu"):
        linear(torch.zeros(2, 8, device=device), pack_weight(torch.zeros(4, 8)), backend="triton")


def test_rows_that_the_copy_engine_can_read_are_described():
    pytest.importorskip("triton", reason="triton is not installed (pip install triton; Linux on x86-64 only)")
    from vivace.kernels.int8_linear.triton_impl import described

    x = torch.zeros(6, 4, 96, dtype=torch.int8)
    found = described(x, 64, 32)
    assert (list(found.shape), list(found.strides), list(found.block_shape)) == ([24, 96], [96, 1], [64, 32])
    assert list(described(x[:, :1], 64, 32).strides) == [384, 1] and list(described(x[:1, :1], 64, 32).shape) == [1, 96]
    assert list(described(x[0], 64, 32).shape) == [4, 96] and list(described(x[..., :50], 64, 32).shape) == [24, 50]
    for odd in (x.transpose(0, 1), x[:, 1:], x[..., 1:], x[:1].expand(6, 4, 96), x.view(-1)[:540].view(2, 3, 90)):
        assert described(odd, 64, 32) is None


@pytest.mark.backend("triton")
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_triton_has_the_same_bits_by_descriptors_and_by_pointers(dtype):
    from vivace.kernels.int8_linear.triton_impl import described, launch

    device, generator = "cpu" if spec.interpreted() else "cuda", torch.Generator().manual_seed(4)
    x, weight = (torch.randn(size, 96, generator=generator) * 40.0 for size in (150, 70))
    x, weight = (t.clamp(-127.0, 127.0).to(device, getattr(torch, dtype)) for t in (x, weight))
    scales = [torch.rand(size, generator=generator).to(device) / 200.0 for size in (150, 70)]
    room = torch.zeros(150, 97, device=device, dtype=x.dtype)
    room[:, :96] = x
    tile, results = tiles.tiles(dtype)[-2], []
    for rows in (x, room[:, :96]):
        out = torch.empty(150, 70, device=device, dtype=torch.bfloat16)
        results.append(launch(tile, rows, weight, *scales, None, "gelu_tanh", None, None, out))
    assert described(room[:, :96], 64, 128) is None and torch.equal(*results)
