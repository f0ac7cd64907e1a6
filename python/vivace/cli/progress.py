"""Progress of long work as bars on stderr, where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import typer


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None] | None]:
    """A function (what, done, in all) that keeps one bar for every `what`, one after the other; None off a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with ExitStack() as stack:
        label, bar, shown = "", None, 0

        def progress(what: str, done: int, total: int) -> None:
            nonlocal label, bar, shown
            if bar is None or what != label:
                stack.close()
                label, shown = what, 0
                bar = stack.enter_context(_bar(what, total))
            bar.update(done - shown)
            shown = done

        yield progress


def _bar(what: str, total: int) -> Any:
    return typer.progressbar(length=total, label=what, file=sys.stderr)
