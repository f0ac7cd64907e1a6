"""The binding of the ops over tokens refuses every id, lane and size that would reach outside memory."""

from typing import Any

import numpy as np
import pytest

_C = pytest.importorskip("vivace._C", reason="vivace._C is not built (make build)")

ROWS, TOKENS, COUNT, WIDTH = 4, 7, 3, 37
IDS = np.array([[0, 2, 6], [1, 3, 4]], np.int32)


def numbers(x: np.ndarray) -> tuple[int, int, int, int]:
    """Rows of float32 as C++ takes them."""
    return x.ctypes.data, 0, x.shape[1] * x.shape[2], x.shape[2]


def gather(**changes: Any) -> np.ndarray:
    """A valid call with arguments replaced."""
    x, out = np.ones((ROWS, TOKENS, WIDTH), np.float32), np.zeros((ROWS, COUNT, WIDTH), np.float32)
    arguments = {
        "ids": (IDS.ctypes.data, 2, TOKENS), "x": numbers(x), "out": numbers(out), "scale": None, "shift": None,
        "weight": None, "bias": None, "normed": None, "sizes": out.shape, "centred": True, "eps": 1e-6, "threads": 1,
    }  # fmt: skip
    _C.gather_tokens(*(arguments | changes).values())
    return out


def scatter(**changes: Any) -> np.ndarray:
    """A valid call with arguments replaced."""
    full, fresh = np.zeros((ROWS + 1, TOKENS, WIDTH), np.float32), np.ones((ROWS, COUNT, WIDTH), np.float32)
    arguments = {
        "ids": (IDS.ctypes.data, 2, TOKENS), "full": numbers(full), "parts": ROWS + 1, "lanes": [4, 0, 2, 1],
        "fresh": numbers(fresh), "second": None, "first": WIDTH, "hidden": None, "gate": None, "sizes": fresh.shape,
        "threads": 1,
    }  # fmt: skip
    _C.scatter_tokens(*(arguments | changes).values())
    return full


def select(**changes: Any) -> np.ndarray:
    """A valid call on scores with arguments replaced."""
    scores, ages, ids = np.arange(5, dtype=np.float32)[None], np.zeros((1, 5), np.int32), np.zeros((1, 2), np.int32)
    arguments = {
        "planes": [], "dtype": 0, "weights": 0, "channels": 0, "grid": (), "patch": (), "deviation": False,
        "scores": scores.ctypes.data, "ages": ages.ctypes.data, "ids": ids.ctypes.data, "sizes": (1, 5, 2), "lowest": 0,
        "factors": 0, "factor_count": 0, "bound": -1, "least": 0, "threads": 1,
    }  # fmt: skip
    _C.select_tokens(*(arguments | changes).values())
    return ids


def attend(**changes: Any) -> np.ndarray:
    """A valid call of kept keys with arguments replaced."""
    query, kept, out = (np.ones((n, 5, 2, 8), np.float32) for n in (3, 4, 3))

    def heads(x: np.ndarray) -> tuple[int, ...]:
        return x.ctypes.data, 80, 16, 8

    arguments: dict[str, Any] = {
        "out": heads(out), "query": heads(query), "key": heads(kept), "value": heads(kept), "sizes": (3, 2, 5, 5, 8),
        "dtype": 0, "scale": 1.0, "threads": 1, "lanes": [3, 0, 3], "parts": 4,
    }  # fmt: skip
    _C.attention(*(arguments | changes).values())
    return out


def test_valid_calls_run() -> None:
    assert (gather() == 1.0).all() and (attend() == 1.0).all() and (select() == [[0, 1]]).all()
    full = scatter()
    assert full.sum() == ROWS * COUNT * WIDTH and (full[3] == 0.0).all() and (full[0][[1, 3, 4]] == 1.0).all()


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (gather, {"ids": (IDS.ctypes.data, 2, 6)}, "id 6 is not one of 6 tokens"),
        (gather, {"ids": (IDS.ctypes.data, 3, TOKENS)}, "ids of 3 samples for 4 rows"),
        (gather, {"ids": (0, 2, TOKENS)}, "ids has no memory"),
        (gather, {"x": None}, "x has no memory"),
        (scatter, {"lanes": [4, 0, 2, 5]}, "lane 5 of 5"),
        (scatter, {"lanes": [4, 0, 2, -1]}, "lane -1 of 5"),
        (scatter, {"lanes": [4, 0, 2, 0]}, "lane 0 is given twice"),
        (scatter, {"lanes": [4, 0]}, "2 lanes for a batch of 4"),
        (scatter, {"lanes": None, "parts": 3}, "lane 3 of 3"),
        (scatter, {"ids": (IDS.ctypes.data, 2, 5)}, "id 6 is not one of 5 tokens"),
        (scatter, {"full": None}, "full has no memory"),
        (select, {"sizes": (1, 5, 6)}, "6 of 5 tokens"),
        (select, {"lowest": 4}, "4 dropped from the bottom"),
        (select, {"scores": 0}, "scores has no memory"),
        (select, {"grid": (5,)}, "1 axes of tokens, 0 of pixels"),
        (attend, {"lanes": [3, 0, 4]}, "lane 4 of 4"),
        (attend, {"lanes": [3, 0, -1]}, "lane -1 of 4"),
        (attend, {"lanes": [3, 0]}, "2 lanes for a batch of 3"),
        (attend, {"key": (0, 80, 16, 8)}, "key of sample 0 has no memory"),
    ],
)
def test_what_would_reach_outside_is_refused(call: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)
