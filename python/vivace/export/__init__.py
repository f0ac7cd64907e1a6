"""Packs, engines and model repositories from a model and its plan.

    export_onnx(pipe, plan, out)           a pack: graphs per variant, plan, weights once, goldens, manifest
    export_tensorrt(pack, out)             engines of a pack's graphs
    export_triton_server(pack, out)        a model repository for a server of graphs

Nothing is loaded before it is used; `pip install 'vivace[onnx]'` has what packs are written with.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vivace.errors import BackendError

_HOME = {"export_onnx": "packing", "export_tensorrt": "tensorrt", "export_triton_server": "triton_server"}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vivace.export' has no attribute {name!r}")
    try:
        module = import_module(f"vivace.export.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "vivace":
            raise
        raise BackendError(f"export: {error.name} is not installed; pip install 'vivace[onnx]'") from None
    return getattr(module, name)
