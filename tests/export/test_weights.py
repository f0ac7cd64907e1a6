"""The weights file: every array once, bit for bit, in the order in which graphs use it, and never twice in memory."""

import errno
import tracemalloc

import ml_dtypes
import numpy as np
import onnx
import pytest

from vivace.errors import OutputError, UnsupportedError
from vivace.export.weights import ALIGNMENT, INLINE, Place, WeightStore, dtype_of, is_external, place_of
from vivace.runtime.manifest import DTYPES


@pytest.fixture
def store():
    with WeightStore() as made:
        yield made


def drawn(shape, dtype="float32", seed=0):
    bits = np.random.default_rng(seed).standard_normal(shape)
    return (bits > 0 if dtype == "bool" else 40 * bits).astype(dtype_of(dtype))


@pytest.mark.parametrize("shape", [(64, 32), (3,), (), (0, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_every_dtype_come_back_bit_for_bit(store, dtype, shape):
    array = drawn(shape, dtype)
    tensor = store.tensor("blocks.0.qkv.weight", array)
    back = store.array(tensor)
    assert back.dtype == array.dtype and back.shape == array.shape and back.tobytes() == array.tobytes()
    assert tensor.name == "blocks.0.qkv.weight" and tuple(tensor.dims) == shape


def test_dtypes_are_those_that_onnx_numbers():
    assert all(number == onnx.helper.np_dtype_to_tensor_dtype(dtype_of(name)) for name, (number, _) in DTYPES.items())
    assert all(size == dtype_of(name).itemsize for name, (_, size) in DTYPES.items())


def test_small_arrays_stay_in_their_graph_and_larger_ones_lie_in_the_file(store):
    small, large = drawn(INLINE // 4 - 1), drawn(INLINE // 4)
    assert not is_external(store.tensor("a", small)) and is_external(store.tensor("b", large))
    assert store.size == INLINE


def test_equal_bytes_are_stored_once_whatever_their_name_and_shape(store):
    array = drawn((64, 32))
    tensors = [store.tensor(f"w{n}", each) for n, each in enumerate((array, array.copy(), array.reshape(32, 64)))]
    assert len({place_of(tensor) for tensor in tensors}) == 1 and store.size == array.nbytes
    assert [tuple(tensor.dims) for tensor in tensors] == [(64, 32), (64, 32), (32, 64)]


def test_equal_bytes_of_another_dtype_are_another_tensor(store):
    zeros = np.zeros(4096, np.uint8)
    places = {place_of(store.tensor("w", zeros.view(dtype))) for dtype in (np.uint8, np.int8, ml_dtypes.bfloat16)}
    assert len(places) == 3


def test_views_and_foreign_byte_orders_are_stored_as_their_values(store):
    array = drawn((64, 32))
    for view in (array.T, array[::2], array[:, 3:19], array.astype(">f4")):
        back = store.array(store.tensor("w", view))
        assert (back == view).all() and back.dtype == np.float32


def test_places_are_aligned_and_do_not_overlap(store):
    places = [place_of(store.tensor("w", drawn(1031 + n, "int8", n))) for n in range(9)]
    assert all(place.offset % ALIGNMENT == 0 for place in places)
    assert all(one.offset + one.length <= two.offset for one, two in zip(places, places[1:], strict=False))


def test_a_written_file_has_what_is_named_in_that_order_and_no_more(store, tmp_path):
    arrays = [drawn(300 + n, seed=n) for n in range(4)]
    places = [place_of(store.tensor("w", array)) for array in arrays]
    moved = store.write(tmp_path / "weights.bin", [places[2], places[0], places[2]])
    raw = (tmp_path / "weights.bin").read_bytes()
    assert list(moved) == [places[2], places[0]] and len(raw) == 1216 + 1200
    for n in (0, 2):
        place = moved[places[n]]
        assert raw[place.offset : place.offset + place.length] == arrays[n].tobytes()


def test_a_place_beyond_the_store_is_refused(store):
    with pytest.raises(ValueError, match="beyond"):
        store.read(Place(0, 1))


def test_an_array_is_not_held_a_second_time():
    array = drawn((4096, 1024))
    with WeightStore() as store:
        tracemalloc.start()
        tensor = store.tensor("w", array)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < array.nbytes / 8 and len(tensor.SerializeToString()) < 256


def test_nothing_is_left_on_the_disk(tmp_path):
    with WeightStore(tmp_path) as store:
        store.tensor("w", drawn(4096))
        assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_error(store, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    tensor = store.tensor("w", drawn(4096))
    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OutputError, match="No space left"):
        store.tensor("w", drawn(4097))
    assert (store.array(tensor) == drawn(4096)).all()
    with pytest.raises(OutputError, match="cannot be written"):
        store.write(tmp_path / "none" / "weights.bin")


@pytest.mark.parametrize("dtype", ["complex64", "U4", "float8_e5m2"])
def test_dtypes_that_no_graph_has_are_refused_by_name(store, dtype):
    with pytest.raises(UnsupportedError, match="blocks.7.mlp.*dtype"):
        store.tensor("blocks.7.mlp", np.zeros(3, dtype_of(dtype)))
