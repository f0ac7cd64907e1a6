"""Linear layers of foreign networks on our packed product: float32 or bfloat16 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.linear import linear, pack_weight
from vivace.models.pipelines.fused.ops import ready
from vivace.models.pipelines.views import fork

LINEAR = "torch.nn.modules.linear.Linear"


def problem(module: Any, dtype: torch.dtype) -> str | None:
    """Why the plain linear layer `module` cannot be packed; None when it can."""
    tensors = [tensor for tensor in (module.weight, module.bias) if tensor is not None]
    other = next((tensor.dtype for tensor in tensors if tensor.dtype is not dtype), None)
    return None if other is None else f"weights in {str(other)[6:]}"


def packed(module: Any) -> Any:
    """A stand-in of the linear layer `module` with its weight packed once; calls that need more take the original."""
    weight, bias = pack_weight(module.weight), module.bias
    dtype = module.weight.dtype

    def forward(x: Tensor) -> Tensor:
        if x.dtype is dtype and ready(x) and x.numel():
            return linear(x if x.stride(-1) == 1 else x.contiguous(), weight, bias)
        plain: Tensor = module(x)
        return plain

    return standing(module, forward)


def packed_as(module: Any, dtype: torch.dtype) -> Any:
    """A stand-in of the linear layer `module` that multiplies in another dtype and returns the dtype of its input."""
    weight, bias = pack_weight(module.weight.to(dtype)), None if module.bias is None else module.bias.float()

    def forward(x: Tensor) -> Tensor:
        return linear(x.to(dtype).contiguous(), weight, bias, out_dtype=x.dtype)

    return standing(module, forward)


def standing(module: Any, forward: Callable[..., Tensor]) -> Any:
    """A copy of `module` that shares all it has but its forward."""
    stand_in = fork(module)
    stand_in.__dict__["forward"] = forward
    return stand_in
