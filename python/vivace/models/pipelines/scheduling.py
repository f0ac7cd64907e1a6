"""The scheduler of one call: a copy of the pipeline's, of a class that asks the run what to do."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

_METHODS = ("set_timesteps", "scale_model_input", "step", "add_noise", "scale_noise", "set_begin_index")
_RUN = "_vivace_run"


def scheduler_of(scheduler: Any, run: Any) -> Any:
    """A copy of `scheduler` that hands its calls to `run` as `run.<method>(original method, *args, **kwargs)`.

    It keeps class name, signatures, configuration and tables, which pipelines read; `run.init_noise_sigma(own)` is
    asked for the scale of the start noise.
    """
    made = copy.deepcopy(scheduler)
    made.__class__ = _driven(type(scheduler), hasattr(scheduler, "init_noise_sigma"))
    made.__dict__[_RUN] = run
    return made


def arguments_of(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of a bound method by name, defaults left out."""
    return dict(signature_of(method.__func__).bind(None, *args, **kwargs).arguments)


@cache
def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function of a class; looked up once."""
    return inspect.signature(function)


@cache
def _driven(cls: type, scaled: bool) -> type:
    """The subclass of a scheduler class that asks its run; scaled: it has an `init_noise_sigma`."""

    def method(name: str) -> Any:
        original = getattr(cls, name)

        @wraps(original)
        def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.__dict__[_RUN], name)(original.__get__(self), *args, **kwargs)

        return asked

    def scale(self: Any) -> Any:
        kept = self.__dict__
        own = kept["init_noise_sigma"] if "init_noise_sigma" in kept else super(made, self).init_noise_sigma
        return kept[_RUN].init_noise_sigma(own)

    def keep(self: Any, value: Any) -> None:
        self.__dict__["init_noise_sigma"] = value

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        self.__dict__[_RUN].copied()
        twin = object.__new__(cls)
        twin.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k != _RUN}, memo))
        return twin

    body: dict[str, Any] = {name: method(name) for name in _METHODS if hasattr(cls, name)}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body |= {"__deepcopy__": copied} | ({"init_noise_sigma": property(scale, keep)} if scaled else {})
    made = type(cls.__name__, (cls,), body)
    return made
