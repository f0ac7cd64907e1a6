"""Stand-ins that share an object's state, so that one call can see it differently while nobody else does.

Nothing is patched: the object, its class and its module stay as they are, and other threads keep seeing them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any


def view(target: Any, **overrides: Callable[..., Any]) -> Any:
    """An object like `target` on which the named methods are `overrides`; both share one `__dict__`.

    The stand-in is an instance of a subclass of type(target) with the same name: isinstance, attributes, parameters and
    hooks are the target's own, and what is set on one is set on the other.

    Args:
        overrides: method name -> callable without self; `__call__` included.
    """
    made = object.__new__(_viewing(type(target), tuple(sorted(overrides))))
    object.__setattr__(made, "__dict__", target.__dict__)
    object.__setattr__(made, "_vivace", overrides)
    return made


def fork(module: Any, **children: Any) -> Any:
    """A torch module like `module` with some of its children replaced; every other part is shared.

    Its `__dict__` and table of children are its own shallow copies: what is set on the stand-in stays there.
    """
    made = object.__new__(type(module))
    state = dict(module.__dict__)
    state["_modules"] = {**state["_modules"], **children}
    object.__setattr__(made, "__dict__", state)
    return made


@cache
def _viewing(cls: type, names: tuple[str, ...]) -> type:
    """The subclass of `cls` whose methods `names` are looked up in the instance's overrides."""

    def override(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return object.__getattribute__(self, "_vivace")[name](*args, **kwargs)

        return wraps(getattr(cls, name))(method)  # signatures are read by those who call it

    body: dict[str, Any] = {name: override(name) for name in names}
    body |= {"__slots__": ("_vivace",), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body | {"__doc__": cls.__doc__})
