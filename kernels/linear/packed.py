"""Weights in the order in which the CPU kernels read them: panels of 64 rows of W, see csrc/ops/gemm.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vivace.errors import ArgumentError, BackendError, DtypeError, ShapeError
from vivace.kernels.norm_modulate.check import dtype_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PANEL = 64
CODES = {"float32": 0, "bfloat16": 1, "int8": 3}


class PackedWeight:
    """A weight [N, K] packed for the CPU, float32, bfloat16 or int8; holds a copy and never changes.

    Its first dimension is padded to a multiple of 64 with zeros. Made by `pack_weight`.
    """

    __slots__ = ("_data", "_numbers", "device", "dtype", "shape")

    def __init__(self, data: Tensor, columns: int, depth: int, dtype: torch.dtype) -> None:
        self._data, self.shape, self.dtype, self.device = data, (columns, depth), dtype, data.device
        self._numbers = (data.data_ptr(), data.numel(), columns, depth, CODES[dtype_name(dtype)])

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return int(self._data.numel())

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        """As `vivace._C` takes it: address, bytes, columns N, depth K, dtype code."""
        return self._numbers

    def data_ptr(self) -> int:
        """Address of the first panel, a multiple of 64."""
        return self._numbers[0]

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        """2."""
        return 2

    def is_contiguous(self) -> bool:
        """As the weight is unpacked."""
        return True

    def unpack(self) -> Tensor:
        """The weight [N, K] again, to the bit."""
        columns, depth = self.shape
        group = 4 // self.dtype.itemsize  # neighbours of a row that lie side by side
        panels, lines = -(-columns // PANEL), -(-depth // group)
        numbers = self._data[: panels * lines * PANEL * 4].view(self.dtype).view(panels, lines, PANEL, group)
        return numbers.permute(0, 2, 1, 3).reshape(-1, lines * group)[:columns, :depth].contiguous()

    def __repr__(self) -> str:
        return f"PackedWeight({list(self.shape)}, {dtype_name(self.dtype)}, {self.nbytes} bytes)"


def pack_weight(weight: Tensor) -> PackedWeight:
    """W [N, K] in panels of 64 rows; float32 [N / 64, K, 64], bfloat16 [.., K / 2, 64, 2], int8 [.., K / 4, 64, 4].

    Args:
        weight: float32 | bfloat16 | int8 [N, K] on the CPU, N and K 1 or more, elements of a row side by side; copied.
    Raises: ShapeError, DtypeError, ArgumentError; BackendError where vivace._C is not built.
    """
    check_packable(weight)
    import torch

    try:
        from vivace import _C
    except ImportError:
        raise BackendError(
            "pack_weight: vivace._C is not built (python setup.py build_ext --inplace); give linear the Tensor itself"
        ) from None
    weight = weight.detach()
    (columns, depth), code = weight.shape, CODES[dtype_name(weight.dtype)]
    data = torch.empty(_C.packed_bytes(columns, depth, code), dtype=torch.uint8)
    row = weight.stride(0) if columns > 1 else depth
    packed = PackedWeight(data, columns, depth, weight.dtype)
    _C.pack_matrix(packed.numbers, weight.data_ptr(), row, torch.get_num_threads())
    return packed


def check_packable(weight: Any) -> None:
    """Raises ShapeError, DtypeError, ArgumentError unless `weight` can be packed."""
    if weight.dim() != 2 or not weight.numel():
        raise ShapeError(f"pack_weight: weight has shape {tuple(weight.shape)}, needs [N, K], both 1 or more")
    if dtype_name(weight.dtype) not in CODES:
        raise DtypeError(f"pack_weight: weight is {dtype_name(weight.dtype)}, needs float32, bfloat16 or int8")
    if weight.device.type != "cpu":
        raise ArgumentError(f"pack_weight: weight is on {weight.device}; packed weights are for the CPU, call .cpu()")
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ShapeError(f"pack_weight: weight has stride {weight.stride(1)} along axis 1, needs 1; call .contiguous()")
