"""The binding of kept planes refuses every lane, plane and dtype that would reach outside memory."""

from typing import Any

import numpy as np
import pytest

_C = pytest.importorskip("vivace._C", reason="vivace._C is not built (make build)")

LANES, PLANES, TOKENS, WIDTH = 4, 2, 3, 37


def memory() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kept planes of ones, their scales, rows of twos."""
    kept = np.ones((LANES, PLANES, TOKENS, WIDTH), np.float32)
    return kept, np.ones(kept.shape[:-1], np.float32), np.full((2, TOKENS, WIDTH), 2.0, np.float32)


def update(**changes: Any) -> np.ndarray:
    """A valid call that keeps two rows with a difference, with arguments replaced; returns what is kept."""
    kept, scales, rows = memory()
    arguments = {
        "kept": (kept.ctypes.data, 0, LANES, PLANES, scales.ctypes.data), "lanes": [3, 0],
        "fresh": (rows.ctypes.data, 0, TOKENS * WIDTH, WIDTH), "base": None, "made": 1, "hidden": None, "gate": None,
        "out": None, "ids": (0, 1, 0), "sizes": (2, TOKENS, WIDTH), "threads": 1,
    }  # fmt: skip
    if "planes" in changes:
        at, number = changes.pop("planes")
        arguments["kept"] = tuple(number if i == at else x for i, x in enumerate(arguments["kept"]))
    _C.cache_update(*(arguments | changes).values())
    return kept


def apply(**changes: Any) -> np.ndarray:
    """A valid call that sums two planes of two rows, with arguments replaced; returns the sums."""
    kept, scales, rows = memory()
    weights = np.array([[2.0, 3.0]] * 2, np.float32)
    arguments = {
        "kept": (kept.ctypes.data, 0, LANES, PLANES, scales.ctypes.data), "lanes": [3, 3],
        "weights": weights.ctypes.data, "terms": 2, "hidden": None, "gate": None,
        "out": (rows.ctypes.data, 0, TOKENS * WIDTH, WIDTH), "ids": (0, 1, 0), "sizes": (2, TOKENS, WIDTH),
        "threads": 1,
    }  # fmt: skip
    if "planes" in changes:
        at, number = changes.pop("planes")
        arguments["kept"] = tuple(number if i == at else x for i, x in enumerate(arguments["kept"]))
    _C.cache_apply(*(arguments | changes).values())
    return rows


def test_valid_calls_run() -> None:
    kept = update()
    assert (kept[[3, 0], 0] == 2.0).all() and (kept[[3, 0], 1] == 1.0).all() and (kept[1:3] == 1.0).all()
    assert (apply() == 5.0).all()


BOTH: dict[str, dict[str, Any]] = {
    "lane 4 of 4": {"lanes": [4, 1]},
    "lane -1 of 4": {"lanes": [1, -1]},
    "1 lanes for a batch of 2": {"lanes": [1]},
    "nothing is kept in dtype 5": {"planes": (1, 5)},
    "nothing is kept in dtype -1": {"planes": (1, -1)},
    "int8 row 0 has no scales": {"kept": (64, 3, LANES, PLANES, 0)},
    "kept row 0 has no memory": {"planes": (0, 0)},
    "fits no memory": {"planes": (3, 1 << 58)},
    "fits no memory ": {"planes": (2, 1 << 58)},
    "is negative": {"planes": (2, -1)},
    "is negative ": {"sizes": (2, -3, WIDTH)},
}


@pytest.mark.parametrize("call", [update, apply])
@pytest.mark.parametrize("message", BOTH)
def test_bad_planes_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.strip()):
        call(**BOTH[message])


def test_bad_numbers_of_one_op_are_refused() -> None:
    for changes, message in (
        ({"made": 2}, "2 differences of 2 planes"),
        ({"made": -1}, "-1 differences"),
        ({"lanes": [1, 1]}, "lane 1 is given twice"),
        ({"fresh": None}, "fresh has no memory"),
        ({"hidden": (64, 0, 1, 1)}, "out has no memory"),
    ):
        with pytest.raises(ValueError, match=message):
            update(**changes)
    for changes, message in (
        ({"terms": 3}, "3 planes of 2"),
        ({"terms": 0}, "0 planes to read"),
        ({"weights": 0}, "weights has no memory"),
        ({"out": None}, "out has no memory"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(**changes)


def test_empty_calls_do_nothing() -> None:
    assert (update(sizes=(0, TOKENS, WIDTH), lanes=[], fresh=None) == 1.0).all()
    assert (apply(sizes=(2, 0, WIDTH), out=None) == 2.0).all()
