"""Linear layers on quantized weights, and layers that run in another dtype than their model: the eager twins.

What a forward is for, its timesteps and with static activations their group, is said around it by `forward_at`: a layer
holds weights and nothing of a request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vivace.errors import StateError, UnsupportedError
from vivace.kernels.int8_linear import int8_linear
from vivace.kernels.linear import PackedWeight, pack_weight
from vivace.kernels.quantize_tokens import quantize_tokens
from vivace.kernels.spec import CPU, missing
from vivace.models.quantized.weights import QuantizedLayer
from vivace.models.rowwise import linear
from vivace.models.versions import version_of

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # precisions that need no weights of their own
TAKEN = (torch.float32, torch.bfloat16, torch.float16)  # what the quantizing ops read


class At(NamedTuple):
    """What a forward is for: timesteps, for messages; groups: int64 [1], or [B] for rows x [B, ..., K]; None: none."""

    timesteps: tuple[float, ...] = ()
    groups: Tensor | None = None


NOWHERE = At()  # outside of forward_at
_AT: ContextVar[At] = ContextVar("vivace_forward", default=NOWHERE)
_PACKED: WeakKeyDictionary[QuantizedLayer, PackedWeight] = WeakKeyDictionary()
_LOCK = Lock()


@contextmanager
def forward_at(timesteps: Sequence[float] | None = None, groups: Tensor | None = None) -> Iterator[None]:
    """Inside, layers know these timesteps, and the timestep group of their rows; None leaves what an outer one said."""
    outer = _AT.get()
    told = outer.timesteps if timesteps is None else tuple(timesteps)
    token = _AT.set(At(told, outer.groups if groups is None else groups))
    try:
        yield
    finally:
        _AT.reset(token)


def packed_weight(layer: QuantizedLayer) -> PackedWeight:
    """The int8 weight of a layer on the CPU as the kernels read it: packed once, shared by all that run the layer."""
    with _LOCK:
        if layer not in _PACKED:
            _PACKED[layer] = pack_weight(layer.weight)
        return _PACKED[layer]


class QuantizedLinear(nn.Module):
    """act(x W^T + bias) with 8-bit weights and activations, by the public kernel functions.

    name: of the layer, for messages; bias: the model's, any floating dtype.
    """

    def __init__(self, name: str, layer: QuantizedLayer, bias: Tensor | None = None) -> None:
        super().__init__()
        self.name, self.layer = name, layer
        self.bias = None if bias is None else bias.detach()
        self.quantize, self.product = _ops(layer)

    def forward(
        self,
        x: Tensor,
        *,
        activation: str = "none",
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """residual + gate * act(x W^T + bias), each that is None left out.

        Args:
            x: floating [..., K]; with static activations the timestep group is that of `forward_at`.
            activation, gate, residual: as in `kernels.int8_linear`; out_dtype: None is that of x.
        Returns: [..., N]. Rows that hold NaN or infinity are NaN.
        Raises: StateError for such rows where VIVACE_DEBUG is 1 or more, naming layer and timesteps.
        """
        wanted = out_dtype or x.dtype
        dtype = wanted if wanted in TAKEN else torch.float32
        once = self.product is int8_linear and x.dtype in TAKEN[:2] and self.layer.x_scale is None and not debugging()
        q, scale = (_rows(x), None) if once else self.quantized(x)
        bias = self.bias if self.bias is None or self.bias.dtype in (torch.float32, dtype) else self.bias.float()
        weight = self._weight()
        options: dict[str, Any] = {"activation": activation, "gate": gate, "residual": residual, "out_dtype": dtype}
        if once:  # rows are quantized in the product's own call, to the same numbers
            options["smooth"] = self.layer.smooth
        return self.product(q, weight, scale, self.layer.weight_scale, bias, **options).to(wanted)

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x in 8 bits [..., K] and float32 scales [...]."""
        x = _rows(x if x.dtype in TAKEN else x.float())
        q, scale = self.quantize(x, smooth=self.layer.smooth, scale=self._given(x))
        if debugging() and not _captured(x) and bool(scale.isnan().any()):
            raise odd_numbers(self.name, _AT.get().timesteps)
        return q, scale

    def _given(self, x: Tensor) -> Tensor | None:
        """The scale of all tokens, [] or [B]; None: each has its own."""
        if self.layer.x_scale is None:
            return None
        groups = _AT.get().groups
        if groups is None:
            raise StateError(f"{self.name}: its activation scales go by timestep, and nothing says which one this is")
        given = self.layer.x_scale[groups]
        return given[0] if len(given) == 1 else given

    def _weight(self) -> Any:
        weight = self.layer.weight
        packs = weight.dtype == torch.int8 and weight.device.type == "cpu" and missing(CPU) is None
        return packed_weight(self.layer) if packs else weight

    def extra_repr(self) -> str:
        columns, depth = self.layer.weight.shape
        return f"{self.name}, in_features={depth}, out_features={columns}, bias={self.bias is not None}"


class CastLinear(nn.Module):
    """A linear layer of a model, computed in another dtype; the result is of the dtype asked for."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.__dict__["layer"], self.dtype = layer, dtype  # not a child: the layer stays its model's
        self._cast: tuple[Any, nn.Linear] | None = None

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x W^T + bias in `dtype`; out_dtype: None is that of x."""
        return linear(x.to(self.dtype), self.cast()).to(out_dtype or x.dtype)

    def cast(self) -> nn.Linear:
        """The layer in `dtype`, made again when its weight was written or replaced."""
        layer: nn.Linear = self.__dict__["layer"]
        tensors = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        stamp = [(tensor.data_ptr(), version_of(tensor)) for tensor in tensors]
        if self._cast is None or self._cast[0] != stamp:
            with torch.device("meta"):
                made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            given = {name: tensor.detach().to(self.dtype) for name, tensor in layer.named_parameters()}
            made.load_state_dict(given, assign=True)
            self._cast = stamp, made.requires_grad_(False)
        return self._cast[1]


def _captured(x: Tensor) -> bool:
    """A graph is being made of this call, which may not look at numbers."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _rows(x: Tensor) -> Tensor:
    """x with the elements of a row side by side, as the ops take it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _ops(layer: QuantizedLayer) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """What quantizes rows for this layer's numbers, and its product. Raises UnsupportedError."""
    if layer.weight.dtype == torch.int8:
        return quantize_tokens, int8_linear
    try:
        from vivace.kernels.fp8_linear import fp8_linear
        from vivace.kernels.fp8_quantize_tokens import fp8_quantize_tokens
    except ImportError:
        raise UnsupportedError("fp8: this release has no kernels for it; quantize to int8") from None
    return fp8_quantize_tokens, fp8_linear


def debugging() -> bool:
    """VIVACE_DEBUG is 1 or more."""
    return os.environ.get("VIVACE_DEBUG", "0") not in ("", "0")


def odd_numbers(layer: str, timesteps: Sequence[float]) -> StateError:
    """The error for activations that hold NaN or infinity."""
    where = f" at timestep {', '.join(f'{t:g}' for t in timesteps)}" if timesteps else ""
    return StateError(
        f"{layer}: its activations hold NaN or infinity{where}; something before it overflowed: run the blocks before "
        "it in bf16 or fp32, or look at the latents and the guidance scale of the step"
    )
