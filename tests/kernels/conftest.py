"""Tests marked `backend(name)` run where that backend can run; elsewhere they are deselected, with the reason told.

Under VIVACE_REQUIRE_EXT=1 tests of the cpu backend are never deselected: without vivace._C they fail.
VIVACE_TEST_PART=k/n: each n-th test of a run alone, from the k-th on, so that n processes share it.
"""

import os

import pytest

from vivace.kernels import spec

REASONS = pytest.StashKey[dict[str, int]]()


def pytest_configure(config):
    config.addinivalue_line("markers", "backend(name): needs the kernel backend of this name")
    config.stash[REASONS] = {}


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items):
    kept, dropped = [], []
    for item in items:
        marker = item.get_closest_marker("backend")
        reason = None if marker is None else reason_to_drop(marker.args[0])
        (kept if reason is None else dropped).append(item)
        if reason is not None:
            config.stash[REASONS][reason] = config.stash[REASONS].get(reason, 0) + 1
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
    if part := os.environ.get("VIVACE_TEST_PART"):
        first, count = map(int, part.split("/"))
        items[:] = items[first::count]


def reason_to_drop(backend):
    """Why tests of a backend cannot run in this process; None when they can or must."""
    missing = spec.missing(backend)
    if missing is None or (backend == "cpu" and os.environ.get("VIVACE_REQUIRE_EXT") == "1"):
        return None
    note = "; test_triton.py runs them in the interpreter" if backend == "triton" else ""
    return f"{backend} kernels: {missing}{note}"


def pytest_terminal_summary(terminalreporter, config):
    for reason, count in config.stash[REASONS].items():
        terminalreporter.write_line(f"deselected {count} tests of {reason}")
