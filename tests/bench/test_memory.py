"""How much memory a piece of work takes."""

import torch

from vivace.bench import memory
from vivace.bench.memory import Growth


def test_growth_counts_what_was_touched_and_given_back():
    with Growth() as growth:
        torch.ones(50_000_000, dtype=torch.uint8)
    assert growth.megabytes is None or 40 < growth.megabytes < 80


def test_a_system_that_does_not_say_gives_none(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "RESET", tmp_path / "absent" / "file")
    with Growth() as growth:
        pass
    assert growth.megabytes is None
