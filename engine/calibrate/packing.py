"""Prompts as JSON data and arrays, so that a table holds them whatever they are: text, class ids, tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivace.errors import ArgumentError

MARK = "$array"  # of a tensor in JSON data


def pack(value: Any, key: str, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    """`value` as JSON data; its tensors go into `arrays` under names that begin with `key`.

    bfloat16 becomes float32, which holds it exactly; where it was bfloat16 is told. Raises ArgumentError.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        plain = value.detach().cpu()
        narrow = plain.dtype == torch.bfloat16
        arrays[key] = (plain.float() if narrow else plain).numpy().copy()
        return {MARK: key} | ({"dtype": "bfloat16"} if narrow else {})
    if isinstance(value, Mapping):
        return {str(name): pack(item, f"{key}.{name}", arrays) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(item, f"{key}.{i}", arrays) for i, item in enumerate(value)]
    raise ArgumentError(
        f"prompts: {type(value).__name__} cannot be kept in a table; use text, numbers, tensors by name"
    )


def unpack(value: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    """The inverse of `pack`; sequences come back as lists."""
    if isinstance(value, Mapping):
        if MARK in value:
            tensor = torch.from_numpy(arrays[value[MARK]].copy())
            return tensor.bfloat16() if value.get("dtype") == "bfloat16" else tensor
        return {name: unpack(item, arrays) for name, item in value.items()}
    if isinstance(value, list):
        return [unpack(item, arrays) for item in value]
    return value
