"""The binding refuses every number that would reach outside memory, and the pool survives threads and forks."""

import os
import signal
import threading
from typing import Any

import numpy as np
import pytest

from vivace.engine import noise

_C = pytest.importorskip("vivace._C", reason="vivace._C is not built (make build)")

OUT, NET, TENSOR, NOISE = 256, 768, 1024, 65536
NUMEL, CAPACITY, SLOTS = 37, 3, 4


def call(ints: dict[int, int] | None = None, **changes: Any) -> np.ndarray:
    """A valid one-sample call, slot 1 <- 2 * slot 0, with entries of the row and arguments replaced."""
    row, floats = np.zeros((1, 32), np.int32), np.zeros((1, 72), np.float32)
    row[0, :2], row[0, 14:26], row[0, 26] = 1, -1, 1
    floats[0, 0], floats[0, 64:68], floats[0, 68:] = 2.0, -np.inf, np.inf
    for at, value in (ints or {}).items():
        row[0, at] = value
    pool = np.ones((SLOTS, CAPACITY, NUMEL), np.float32)
    out = np.ones((1, NUMEL), np.float32)
    arguments = {
        "pool": pool.ctypes.data, "slots": SLOTS, "capacity": CAPACITY, "numel": NUMEL,
        "outs": [(out.ctypes.data, NUMEL, "float32")], "net": 0, "net_dtype": "float32", "tensors": [],
        "ints": row.ctypes.data, "floats": floats.ctypes.data, "table_rows": 1, "rows": [0], "index": [2],
        "seeds": None, "pictures": None, "threads": 1,
    }  # fmt: skip
    _C.solver_step(**(arguments | changes))
    return pool


def test_the_valid_call_runs() -> None:
    assert (call()[1, 2] == 2.0).all()


BAD_CODES = {
    "has 13 sources": {0: 13},
    "has -1 sources": {0: -1},
    "has 5 outputs": {1: 5},
    "has -3 outputs": {1: -3},
    "names pool slot 4 (source 0)": {2: 4},
    "unknown code -1 (source 0)": {2: -1},
    "unknown code 300 (source 0)": {2: 300},
    "unknown code 40000 (source 0)": {2: 40000},
    "reads branch 1": {2: OUT + 1},
    "names tensor 0": {2: TENSOR},
    "reads noise draw 3": {2: NOISE + 3},
    "names pool slot 9 (scale 0)": {14: 9},
    "unknown code -2 (scale 0)": {14: -2},
    "names tensor 7 (scale 0)": {14: TENSOR + 7},
    "writes to 4 (output 0)": {26: 4},
    "writes to -1 (output 0)": {26: -1},
    "writes to 2147483647": {26: 2**31 - 1},
    "pass net": {26: NET},
    "writes destination 1 twice": {1: 2, 27: 1},
    "is of kind 1; sample_adjust runs": {31: 1},
    "adjusts output 0; pass adjust": {30: 1},
    "adjusts outputs it does not have": {30: 2},
}


@pytest.mark.parametrize("message", BAD_CODES)
def test_a_bad_code_is_refused(message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call(BAD_CODES[message])
    assert message in str(caught.value)


def reduce(ints: dict[int, int], ratio: float = 0.5, **changes: Any) -> np.ndarray:
    """A one-sample reduction of slot 0, with entries of the row and arguments replaced."""
    row, floats = np.zeros((1, 32), np.int32), np.zeros((1, 72), np.float32)
    row[0, :2], row[0, 14:26], row[0, 26], row[0, 31] = 1, -1, -1, 1
    floats[0, 0], floats[0, 64], floats[0, 68] = 2.0, ratio, 100.0
    for at, value in ints.items():
        row[0, at] = value
    pool, adjust = np.ones((SLOTS, CAPACITY, NUMEL), np.float32), np.zeros((1, 3), np.float32)
    arguments = {
        "adjust": adjust.ctypes.data, "pool": pool.ctypes.data, "slots": SLOTS, "capacity": CAPACITY, "numel": NUMEL,
        "outs": [], "tensors": [], "ints": row.ctypes.data, "floats": floats.ctypes.data, "table_rows": 1,
        "rows": [0], "index": [2], "seeds": None, "pictures": None, "threads": 1,
    }  # fmt: skip
    _C.sample_adjust(**(arguments | changes))
    return adjust


BAD_REDUCTIONS: dict[str, tuple[dict[int, int], dict[str, Any]]] = {
    "is of kind 0": ({31: 0}, {}),
    "is of kind 3": ({31: 3}, {}),
    "reduces 1 outputs; kind 2 reduces 2": ({31: 2}, {}),
    "reduces, but writes to 1 (output 0)": ({26: 1}, {}),
    "adjusts outputs it does not have": ({30: 2}, {}),
    "has ratio 1.5": ({}, {"ratio": 1.5}),
    "has ratio nan": ({}, {"ratio": np.nan}),
    "reads branch 0": ({2: OUT}, {}),
    "adjust has no memory": ({}, {"adjust": 0}),
    "is in lane 3": ({}, {"index": [3]}),
    "elements a sample": ({}, {"numel": 1 << 32}),
}


@pytest.mark.parametrize("message", BAD_REDUCTIONS)
def test_a_bad_reduction_is_refused(message: str) -> None:
    assert reduce({}).tolist() == [[-2.0, 2.0, 0.5]]
    ints, changes = BAD_REDUCTIONS[message]
    with pytest.raises(ValueError, match="^sample_adjust: ") as caught:
        reduce(ints, **changes)
    assert message in str(caught.value)


BAD_ARGUMENTS = {
    "is at row 1": {"rows": [1]},
    "is at row -1": {"rows": [-1]},
    "is in lane 3": {"index": [3]},
    "is in lane -1": {"index": [-1]},
    "two samples are in lane 1": {"rows": [0, 0, 0], "index": [1, 2, 1]},
    "index has 2 entries": {"index": [0, 1]},
    "seeds has 3 entries": {"seeds": [1, 2, 3]},
    "pictures has 0 entries": {"pictures": []},
    "negative size": {"numel": -1},
    "fits no memory": {"numel": 1 << 62},
    "pool has 257 slots": {"slots": 257},
    "pool has no memory": {"pool": 0},
    "the table has no memory": {"floats": 0},
    "a network output has no memory": {"outs": [(0, NUMEL, "float32")]},
    "dtype float64": {"net_dtype": "float64"},
    "dtype int8": {"outs": [(8, NUMEL, "int8")]},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused(message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call(**BAD_ARGUMENTS[message])
    assert message in str(caught.value)


def test_a_bad_row_writes_nothing() -> None:
    pool = np.ones((SLOTS, CAPACITY, NUMEL), np.float32)
    with pytest.raises(ValueError):
        call({1: 2, 27: 200}, pool=pool.ctypes.data)
    assert (pool == 1.0).all()


def test_codes_of_terms_without_a_coefficient_are_not_read() -> None:
    assert (call({0: 2, 3: 9999, 15: 77})[1, 2] == 2.0).all()


@pytest.mark.parametrize("changes", [{"rows": [], "index": []}, {"numel": 0, "pool": 0}])
def test_an_empty_call_does_nothing(changes: dict[str, Any]) -> None:
    assert (call(**changes) == 1.0).all()


@pytest.mark.parametrize(
    ("numel", "seeds", "draw", "message"),
    [
        (-1, [0], 0, "must not be negative"),
        (4, [0], -1, "draw"),
        (4, [0], 1 << 32, "draw"),
        (1 << 40, [0], 0, "at most"),
    ],
)
def test_bad_noise_arguments_are_refused(numel: int, seeds: list[int], draw: int, message: str) -> None:
    out = np.empty(4, np.float32)
    with pytest.raises(ValueError, match=message):
        _C.philox_normal(out.ctypes.data, numel, seeds, [0] * len(seeds), draw, 1)


def big_noise() -> np.ndarray:
    out = np.empty((1, 1 << 19), np.float32)  # enough work for two threads
    _C.philox_normal(out.ctypes.data, out.size, [11], [2], 1, 2)
    return out[0]


def test_callers_at_the_same_time_get_the_same_bits() -> None:
    expected = noise.normals(1 << 19, 11, picture=2, draw=1)
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.extend((big_noise() == expected).all() for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20 and all(found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork; run on Linux or macOS")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_makes_a_pool_of_its_own() -> None:
    expected = big_noise()  # the parent's pool has threads now
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if (big_noise() == expected).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (big_noise() == expected).all()


def rows_call(**changes: Any) -> np.ndarray:
    """A valid call over rows, one sample of three tokens, with arguments replaced."""
    hidden, out = np.ones((1, 3, NUMEL), np.float32), np.zeros((1, 3, NUMEL), np.float32)
    there, to = ((x.ctypes.data, 0, 3 * NUMEL, NUMEL) for x in (hidden, out))
    arguments = {
        "out": to, "hidden": there, "scale": (hidden.ctypes.data, 0, 0, 0), "shift": None, "weight": None, "bias": None,
        "sizes": (1, 3, NUMEL), "centred": False, "eps": 0.0, "threads": 1,
    }  # fmt: skip
    _C.norm_modulate(*(arguments | changes).values())
    return out


BAD_ROWS: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "hidden has no memory": (ValueError, {"hidden": None}),
    "out has no memory": (ValueError, {"out": (0, 0, 1, 1)}),
    "out has another dtype": (ValueError, {"hidden": (64, 1, 1, 1)}),
    "is negative": (ValueError, {"sizes": (1, -3, NUMEL)}),
    "fits no memory": (ValueError, {"sizes": (1 << 30, 1 << 30, NUMEL)}),
    "eps is nan": (ValueError, {"eps": np.nan}),
    "incompatible function arguments": (TypeError, {"shift": (64, 0, 1)}),
    "norm_modulate()": (TypeError, {"shift": (64, 2, 1, 1)}),
    "arguments": (TypeError, {"shift": (64, 0, 1, "1")}),
    "supported": (TypeError, {"sizes": (3, NUMEL)}),
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_a_bad_call_over_rows_is_refused(message: str) -> None:
    assert (rows_call() == 2.0).all()
    error, changes = BAD_ROWS[message]
    with pytest.raises(error) as caught:
        rows_call(**changes)
    assert message in str(caught.value)


HEADS_AT = (3 * NUMEL, NUMEL, NUMEL)  # strides of one sample of three tokens of one head


def heads_call(
    query: dict[int, int] | None = None, turn: tuple[int, ...] | None = None, **changes: Any
) -> tuple[np.ndarray, ...]:
    """A valid call over heads, keys like queries, with numbers of the queries and arguments replaced."""
    x, table = np.full((1, 3, 1, NUMEL), 2.0, np.float32), np.ones((3, NUMEL), np.float32)
    outs = tuple(np.zeros_like(x) for _ in range(2))
    sides = [[x.ctypes.data, *HEADS_AT, out.ctypes.data, *HEADS_AT, 0, 0, 0, 0, 0, 0, 3, 1] for out in outs]
    for at, number in (query or {}).items():
        sides[0][at] = number
    places = (table.ctypes.data, 0, NUMEL, table.ctypes.data, 0, NUMEL)
    arguments = {
        "query": sides[0], "key": sides[1], "turn": None if turn is None else (*places, *turn), "turn_key": True,
        "halves": False, "batch": 1, "width": NUMEL, "dtype": 0, "kind": 1, "eps": 0.0, "threads": 1,
    }  # fmt: skip
    _C.qk_norm_rope(*(arguments | changes).values())
    return outs


BAD_HEADS: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "query has no memory": (ValueError, {"query": {0: 0}}),
    "query has a negative size": (ValueError, {"query": {14: -1}}),
    "query fits no memory": (ValueError, {"query": {15: 1 << 60}}),
    "a vector of query has 5 elements": (ValueError, {"query": {8: 64, 10: 5}}),
    "a vector of query is of dtype 2": (ValueError, {"query": {8: 64, 9: 2, 10: NUMEL}}),
    "there are no elements of dtype 7": (ValueError, {"dtype": 7}),
    "there is no norm 3": (ValueError, {"kind": 3}),
    "eps is nan": (ValueError, {"eps": np.nan}),
    "tokens 2 to 4 of query are turned, it has 3": (ValueError, {"turn": (2, 2), "width": NUMEL - 1}),
    "tokens -1 to 1 of query": (ValueError, {"turn": (-1, 2)}),
    "cannot be turned in pairs": (ValueError, {"turn": (0, 3)}),
    "incompatible function arguments": (TypeError, {"turn": (0,)}),
}


@pytest.mark.parametrize("message", BAD_HEADS)
def test_a_bad_call_over_heads_is_refused(message: str) -> None:
    assert all((out == 1.0).all() for out in heads_call())
    error, changes = BAD_HEADS[message]
    with pytest.raises(error) as caught:
        heads_call(**changes)
    assert message in str(caught.value)


def test_gelu_of_bad_rows_is_refused() -> None:
    x, out = np.ones((1, 3, NUMEL), np.float32), np.zeros((1, 3, NUMEL), np.float32)
    there, to = ((a.ctypes.data, 0, 3 * NUMEL, NUMEL) for a in (x, out))
    for call, message in (((to, None), "hidden has no memory"), (((0, 0, 1, 1), there), "out has no memory")):
        with pytest.raises(ValueError, match=message):
            _C.gelu(*call, None, (1, 3, NUMEL), False, 1)
    _C.gelu(to, there, None, (1, 3, NUMEL), False, 1)
    assert (abs(out - 0.8413447) < 1e-6).all()


def test_integers_of_bad_rows_are_refused() -> None:
    x = np.full((1, 3, NUMEL), -2.0, np.float32)
    q, scale = np.zeros((1, 3, NUMEL), np.int8), np.zeros((1, 3), np.float32)
    there, sizes = (x.ctypes.data, 0, 3 * NUMEL, NUMEL), (1, 3, NUMEL)

    def alone(q: int, scale: int, x: Any, sizes: tuple[int, int, int]) -> None:
        _C.quantize_tokens(q, scale, x, 0, 0, sizes, 1)

    def behind_a_norm(q: int, scale: int, x: Any, sizes: tuple[int, int, int]) -> None:
        _C.int8_norm_modulate(q, scale, x, None, None, None, None, 0, 0, sizes, False, 0.0, 1)

    for call, name in ((alone, "x"), (behind_a_norm, "hidden")):
        for arguments, message in (
            ((q.ctypes.data, scale.ctypes.data, None, sizes), f"{name} has no memory"),
            ((0, scale.ctypes.data, there, sizes), "q has no memory"),
            ((q.ctypes.data, 0, there, sizes), "scale has no memory"),
            ((q.ctypes.data, scale.ctypes.data, there, (1, -3, NUMEL)), "is negative"),
        ):
            with pytest.raises(ValueError, match=message):
                call(*arguments)
        call(0, 0, None, (0, 3, NUMEL))
        q[:], scale[:] = 0, 0.0
        call(q.ctypes.data, scale.ctypes.data, there, sizes)
        assert (q == -127).all() and (scale > 0.0).all()


def test_an_empty_call_over_rows_does_nothing() -> None:
    assert (rows_call(sizes=(0, 3, NUMEL), hidden=None, out=None) == 0.0).all()
