"""Kernels: small operations with one definition, several implementations and a visible choice between them.

Each folder is one op: `__init__` holds the public function with its contract, `reference` the definition in plain
torch, `cpu_impl` and `triton_impl` the fast ones. `spec` holds the registry and the choice of a backend. Importing this
package imports neither torch nor triton; both are loaded on first use. An op bears the name of its folder, so it is
imported from there: `from vivace.kernels.solver_step import solver_step`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "BackendRow": "spec",
    "Choice": "spec",
    "OpSpec": "spec",
    "backends": "spec",
    "choose": "spec",
    "ops": "spec",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
