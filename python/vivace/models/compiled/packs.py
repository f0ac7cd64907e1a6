"""What is made of a model's weights once and shared by its sessions, as long as model and weights live."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from vivace.errors import StateError
from vivace.models.dit import DiT
from vivace.models.versions import stamp

Made = TypeVar("Made")
_KEPT: WeakKeyDictionary[DiT, dict[str, Any]] = WeakKeyDictionary()
_LOCK = RLock()


def refresh(model: DiT) -> None:
    """Forget what was made of weights that have changed since. Who compiles a model calls this first."""
    now = stamp(model)
    with _LOCK:
        if _KEPT.get(model, {}).get("stamp") != now:
            _KEPT[model] = {"stamp": now}


def kept(model: DiT, name: str, make: Callable[[DiT], Made]) -> Made:
    """make(model), called once; what it returns must not hold the model. `make` may call this for parts of it."""
    with _LOCK:
        made = _KEPT.get(model)
        if made is None:
            made = _KEPT[model] = {"stamp": stamp(model)}
        if name not in made:
            if stamp(model) != made["stamp"]:
                raise StateError("the model's weights were changed since it was compiled; compile it again")
            made[name] = make(model)
        value: Made = made[name]
        return value
