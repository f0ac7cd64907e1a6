"""Planes of a request: rows lie where they lie, nothing is written where it is read."""

import numpy as np
import pytest

from vivace.errors import PackError
from vivace.runtime.kept import KeptPlanes, Place, Rows

PLACE = Place("main", "kept", "attn.0", 0, 0)
FLOAT = np.dtype(np.float32)


def filled(branches=2, pictures=3):
    kept = KeptPlanes(("cond", "uncond")[:branches], pictures)
    everyone = Rows(tuple(range(branches)), tuple(range(pictures)))
    values = np.arange(branches * pictures * 4, dtype=np.float32).reshape(branches * pictures, 4)
    room = kept.room(PLACE, everyone, values.shape, FLOAT, read=False)
    room[...] = values
    kept.took(PLACE, everyone, room, read=False)
    return kept, everyone, values


@pytest.mark.parametrize(
    ("branches", "pictures", "view"),
    [((0, 1), (0, 1, 2), True), ((1,), (0, 1, 2), True), ((0,), (1, 2), True), ((0,), (0, 2), False),
     ((0, 1), (0, 2), False), ((1, 0), (0, 1, 2), False), ((0, 1), (1, 2), False)],
)  # fmt: skip
def test_rows_are_read_branch_by_branch_without_a_copy_where_they_lie_side_by_side(branches, pictures, view):
    kept, everyone, values = filled()
    found = kept.read(PLACE, Rows(branches, pictures))
    wanted = values.reshape(2, 3, 4)[np.ix_(branches, pictures)].reshape(-1, 4)
    assert np.array_equal(found, wanted) and found.flags["C_CONTIGUOUS"]
    assert np.shares_memory(found, kept.read(PLACE, everyone)) == view


@pytest.mark.parametrize("rows", [Rows((0, 1), (0, 1, 2)), Rows((1,), (0, 1, 2)), Rows((0, 1), (0, 2))])
def test_what_is_read_is_not_written_and_other_rows_stay(rows):
    kept, everyone, values = filled()
    for turn in range(3):
        was = kept.read(PLACE, rows)
        room = kept.room(PLACE, rows, (len(rows), 4), FLOAT, read=True)
        assert not np.shares_memory(room, was)
        room[...] = was + 1
        kept.took(PLACE, rows, room, read=True)
        expected = values.reshape(2, 3, 4).copy()
        expected[np.ix_(rows.branches, rows.pictures)] += turn + 1
        assert np.array_equal(kept.read(PLACE, everyone).reshape(2, 3, 4), expected)


def test_values_that_the_runtime_allocated_are_taken_over():
    kept = KeptPlanes(("cond",), 2)
    kept.took(PLACE, Rows((0,), (0, 1)), np.ones((2, 5), np.float32), read=False)
    assert kept.read(PLACE, Rows((0,), (1,))).tolist() == [[1.0] * 5] and kept.nbytes == 40


def test_reading_what_nobody_kept_is_our_bug():
    with pytest.raises(PackError, match="no row before kept it"):
        KeptPlanes(("cond",), 1).read(PLACE, Rows((0,), (0,)))
