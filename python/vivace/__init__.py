"""Vivace: a compiled inference engine for diffusion models, driven by sampling plans.

Nothing is loaded before it is used: `import vivace` needs neither torch nor a compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_FROM = {
    "engine.bind": ("ModelSpec",),
    "engine.noise_schedule": ("NoiseSchedule",),
    "engine.plan": (
        "Action",
        "Affine",
        "AgeRef",
        "Guard",
        "InputRef",
        "Plan",
        "Rule",
        "Step",
        "TensorRef",
        "Transform",
        "Variant",
    ),
    "engine.planning": ("make_plan",),
    "engine.sample": ("sample",),
    "engine.request": ("Request",),
    "engine.session": ("Session",),
    "engine.verify": ("verify",),
    "errors": (
        "ArgumentError",
        "BackendError",
        "DtypeError",
        "ModelError",
        "OutputError",
        "PackError",
        "PlanError",
        "PlanFileError",
        "PromptError",
        "ShapeError",
        "StateError",
        "UnsupportedError",
        "VivaceError",
    ),
    "kernels.spec": ("backends",),
    "models.pipe": ("load",),
    "models.pipelines.accelerate": ("accelerate", "receipt", "restore"),
    "models.pipelines.decode": ("DecodeOptions",),
    "models.pipelines.families": ("register_family",),
}
_HOME = {name: module for module, names in _FROM.items() for name in names}
_MODULES = {
    "passes": "engine.passes",
    "planners": "engine.planners",
    "sources": "engine.sources",
    "metrics": "metrics",
    "runtime": "runtime",
    "export": "export",
    "engine": "engine",
    "kernels": "kernels",
}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"vivace.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"vivace.{_MODULES[name]}")
    else:
        raise AttributeError(f"module 'vivace' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
