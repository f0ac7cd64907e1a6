"""torch.compile as a peer, with a limit on how long it may take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """TimeoutError in the enclosed work after `seconds`; no limit outside of the main thread."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"no code after {seconds} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def compiled_peer(
    function: Callable[..., Any], inputs: Sequence[Any], seconds: int = 90, *, compiled: bool = False
) -> tuple[Callable[[], Any] | None, str | None]:
    """`function` compiled for these inputs, as a call without arguments; or None and why not.

    compiled: `function` runs something that is compiled already, by its first call.
    """
    import torch

    torch.compiler.reset()  # else the ninth shape would run uncompiled
    step = function if compiled else torch.compile(function, dynamic=False)
    try:
        with no_longer_than(seconds):
            step(*inputs)
    except (RuntimeError, OSError) as error:  # what inductor raises without a compiler; TimeoutError is an OSError
        return None, f"torch.compile: {str(error).splitlines()[0]}"
    return lambda: step(*inputs), None
