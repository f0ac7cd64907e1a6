"""Work under way: what was done is read, not done again; work of another description is refused by name."""

import numpy as np
import pytest

from vivace.engine.calibrate.resume import Partial, difference
from vivace.errors import ArgumentError, ModelError, OutputError

ABOUT = {"method": "m", "fingerprint": "f" * 64, "seed": 0, "grid": (1.0, 0.5)}


def square(done, n):
    def make():
        done.append(n)
        return np.array([n * n], dtype=np.float64)

    return make


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    path, done = tmp_path / "work", []
    with pytest.raises(KeyboardInterrupt), Partial(path, ABOUT) as partial:
        for n in range(5):
            if n == 3:
                raise KeyboardInterrupt
            partial.once(f"square.{n}", square(done, n))
            partial.data["next"] = n + 1
    with Partial(path, ABOUT) as partial:
        assert partial.resumed and partial.data == {"next": 3} and len(partial) == 3
        made = [float(partial.once(f"square.{n}", square(done, n))[0]) for n in range(5)]
    assert done == [0, 1, 2, 3, 4] and made == [0.0, 1.0, 4.0, 9.0, 16.0]
    assert len(Partial(path, ABOUT)) == 5  # it stays until it is removed
    assert not Partial(path, ABOUT, anew=True)
    partial.remove()
    assert not path.exists() and not Partial(path, ABOUT).resumed
    partial.remove()


def test_work_of_another_description_is_refused_by_its_field(tmp_path):
    path = tmp_path / "work"
    with Partial(path, ABOUT) as partial:
        partial["a"] = np.zeros(3)
    with pytest.raises(ArgumentError, match="another calibration .seed 0, now 1.*remove it"):
        Partial(path, ABOUT | {"seed": 1})
    with pytest.raises(ArgumentError, match="more null, now 2"):
        Partial(path, ABOUT | {"more": 2})
    assert difference(ABOUT, ABOUT) == "nothing differs"


def test_without_a_file_it_is_memory_and_arrays_are_copies(tmp_path):
    array = np.zeros(2)
    with Partial(None, ABOUT) as partial:
        partial["a"] = array
        array += 1
        assert partial["a"].tolist() == [0.0, 0.0] and list(partial) == ["a"]
        del partial["a"]
        partial.save(now=True)
    assert list(tmp_path.iterdir()) == []


def test_it_is_written_seldom_but_when_it_ends(tmp_path):
    path = tmp_path / "work"
    with Partial(path, ABOUT, interval=3600.0) as partial:
        partial.once("a", lambda: np.zeros(1))
        assert not path.exists()
    assert path.exists()
    with Partial(tmp_path / "at once", ABOUT, interval=0.0) as partial:
        partial.once("a", lambda: np.zeros(1))
        assert (tmp_path / "at once").exists()


def test_damaged_files_and_bad_descriptions_are_told(tmp_path):
    path = tmp_path / "work"
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="no work of a calibration.*remove it"):
        Partial(path, ABOUT)
    with pytest.raises(ArgumentError, match="JSON data"):
        Partial(None, {"x": float("nan")})
    with pytest.raises(OutputError), Partial(tmp_path / "no" / "folder", ABOUT) as partial:
        partial["a"] = np.zeros(1)
