"""The weights of a pack: one file, which every graph points into, each tensor once however many graphs read it.

Arrays go to an unnamed temporary file as they come, so that a model of many GB is never held a second time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import onnx

from vivace.errors import OutputError, UnsupportedError
from vivace.runtime.manifest import DTYPES, WEIGHTS

ALIGNMENT = 64  # bytes; what a memory map hands to SIMD loads
INLINE = 1024  # bytes; smaller arrays stay inside their graph
CHUNK = 1 << 22
NAMES = {number: name for name, (number, _) in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where bytes lie in the store or in a weights file."""

    offset: int
    length: int


class WeightStore:
    """Collects the arrays of graphs. Close it, or use it as a context, to free its space on disk.

    folder: where the temporary file lies (the system's own folder for such when None); it has no name there, so nothing
    is left behind whatever happens. Raises OutputError when the disk is full.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)
        self._places: dict[tuple[str, bytes], Place] = {}
        self._end = 0

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the space on disk; tensors that were handed out stay as they are."""
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes of the arrays stored so far, each once, without those that stay in their graph."""
        return sum(place.length for place in self._places.values())

    def tensor(self, name: str, array: Any) -> onnx.TensorProto:
        """The initializer `name` of a graph with the values of a numpy array, which may be reshaped or freed later.

        array: any shape; float32, float64, float16, bfloat16, float8_e4m3fn, int8, uint8, int32, int64 or bool. Of at
        least 1 KiB it is external data in "weights.bin", shared with every array of equal dtype and bytes, else within.
        Raises UnsupportedError for another dtype.
        """
        array = np.asarray(array)
        if array.dtype.name not in DTYPES:
            raise UnsupportedError(
                f"weight {name!r}: dtype {array.dtype.name} cannot stand in a pack; use {', '.join(DTYPES)}"
            )
        made = onnx.TensorProto(name=name, data_type=DTYPES[array.dtype.name][0], dims=array.shape)
        raw = _little(array)
        if raw.nbytes < INLINE:
            made.raw_data = raw.tobytes()
        else:
            point(made, self._stored(array.dtype.name, raw))
        return made

    def array(self, tensor: onnx.TensorProto) -> Any:
        """A copy of the values of an initializer that this store made, as a numpy array of its shape and dtype."""
        raw = self.read(place_of(tensor)) if is_external(tensor) else tensor.raw_data
        return np.frombuffer(raw, dtype=dtype_of(NAMES[tensor.data_type])).reshape(tuple(tensor.dims)).copy()

    def read(self, place: Place) -> bytes:
        """The bytes at a place."""
        return b"".join(self._chunks(place))

    def write(self, path: str | os.PathLike[str], places: Iterable[Place] | None = None) -> dict[Place, Place]:
        """Write a weights file with these places, in their order and each once (None: all, where they are).

        Returns where each came to lie. Raises OutputError.
        """
        wanted = self._places.values() if places is None else dict.fromkeys(places)
        moved: dict[Place, Place] = {}
        end = 0
        try:
            with open(path, "wb") as out:
                for place in wanted:
                    start = _aligned(end)
                    out.write(bytes(start - end))
                    for chunk in self._chunks(place):
                        out.write(chunk)
                    end = start + place.length
                    moved[place] = Place(start, place.length)
        except OSError as error:
            raise OutputError(f"{Path(path)}: cannot be written ({error.strerror}); choose a writable place") from None
        return moved

    def _stored(self, dtype: str, raw: Any) -> Place:
        key = (dtype, hashlib.sha256(raw).digest())
        if key not in self._places:
            place = Place(_aligned(self._end), raw.nbytes)
            self._put(raw, place.offset)
            self._places[key] = place
            self._end = place.offset + place.length
        return self._places[key]

    def _put(self, raw: Any, offset: int) -> None:
        view = memoryview(raw)
        try:
            while view.nbytes:
                written = os.pwrite(self._file.fileno(), view[:CHUNK], offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise OutputError(
                f"weights: {offset} bytes fit into the temporary file, no more ({error.strerror}); "
                "make room, or name another folder"
            ) from None

    def _chunks(self, place: Place) -> Iterator[bytes]:
        at, end = place.offset, place.offset + place.length
        while at < end:
            chunk = os.pread(self._file.fileno(), min(CHUNK, end - at), at)
            if not chunk:
                raise ValueError(f"weights: {place} lies beyond the store")
            yield chunk
            at += len(chunk)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the values of a tensor lie in another file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def place_of(tensor: onnx.TensorProto) -> Place:
    """Where the values of an external tensor lie."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return Place(int(entries["offset"]), int(entries["length"]))


def point(tensor: onnx.TensorProto, place: Place) -> None:
    """Let a tensor have the values at a place of "weights.bin"."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", WEIGHTS), ("offset", str(place.offset)), ("length", str(place.length))):
        tensor.external_data.add(key=key, value=value)


def dtype_of(name: str) -> Any:
    """The numpy dtype of a name, those of `ml_dtypes` too."""
    return np.dtype(getattr(ml_dtypes, name, name))


def _little(array: Any) -> Any:
    """The bytes of an array, row by row, little-endian; without a copy where they lie so."""
    swapped = array.astype(array.dtype.newbyteorder("<"), copy=False) if array.dtype.byteorder == ">" else array
    return np.ascontiguousarray(swapped).reshape(-1).view(np.uint8)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
