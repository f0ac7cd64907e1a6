"""Peak memory is that of the work, and says how it was found."""

import json

import numpy as np
import pytest
import torch
from tests.models.pipelines.tiny import FAMILIES, make

from vivace.models.pipelines import memory

MIB = 2**20


def use(mebibytes):
    """Touch that many MiB, let go of them, and return one number."""
    return int(np.ones(mebibytes * MIB, np.uint8)[-1])


def test_the_peak_of_freed_memory_is_seen_and_the_result_handed_on():
    result, peak = memory.peak_memory(lambda: use(64))
    assert result == 1 and peak.added == peak.peak - peak.before
    assert 60 * MIB <= peak.added <= 72 * MIB


def test_an_earlier_peak_does_not_count():
    use(128)
    _, peak = memory.peak_memory(lambda: use(16))
    assert peak.how != memory.MONOTONE and peak.added <= 24 * MIB


def test_without_leave_to_reset_the_size_is_sampled(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "RESET", tmp_path / "none" / "clear_refs")
    held = []

    def work():
        held.append(np.ones(64 * MIB, np.uint8))
        return len(held)

    result, peak = memory.peak_memory(work)
    assert result == 1 and peak.how == memory.SAMPLED and 60 * MIB <= peak.added


def test_without_proc_the_largest_size_so_far_is_all_there_is(monkeypatch, tmp_path):
    for name in ("RESET", "STATUS"):
        monkeypatch.setattr(memory, name, tmp_path / "none" / "file")
    result, peak = memory.peak_memory(lambda: 7)
    assert result == 7 and peak.how == memory.MONOTONE and peak.peak >= peak.before > 0


@pytest.mark.parametrize("permitted", [True, False])
def test_an_error_of_the_work_comes_through(monkeypatch, tmp_path, permitted):
    if not permitted:
        monkeypatch.setattr(memory, "RESET", tmp_path / "none" / "clear_refs")

    def fail():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        memory.peak_memory(fail)


def test_on_cuda_the_devices_own_peak_is_read(monkeypatch):
    calls = []
    values = {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 5, "max_memory_allocated": 12}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, value=value: calls.append(name) or value)
    result, peak = memory.peak_memory(lambda: calls.append("work") or 3, "cuda")
    assert result == 3 and peak == memory.Peak(5, 12, memory.DEVICE) and peak.added == 7
    assert calls == [
        "synchronize",
        "reset_peak_memory_stats",
        "memory_allocated",
        "work",
        "synchronize",
        "max_memory_allocated",
    ]


def test_a_row_states_load_run_and_accelerated_run():
    pipe = make("sd15")
    row = memory.measure("sd15", pipe, FAMILIES["sd15"].arguments())
    expected = sum(p.numel() * 4 for part in (pipe.unet, pipe.vae) for p in part.parameters())
    assert (row.family, row.weights) == ("sd15", expected) and row.how in (memory.EXACT, memory.SAMPLED)
    assert min(row.load, row.run, row.accelerated) >= 0 and row.load < 64 * MIB and row.resident > 64 * MIB


def test_the_page_has_a_line_a_family_and_says_where_and_how():
    rows = [memory.MemoryRow(name, 2048, 3072, 0, 1024, 5 * MIB, memory.EXACT) for name in ("one", "two")]
    page = memory.markdown(rows, "some command")
    assert "| one | 2 | 3 | 0 | 1 | 5 |\n| two | 2 | 3 | 0 | 1 | 5 |\n" in page
    for stated in (torch.__version__, "some command", memory.EXACT, "CPU"):
        assert stated in page


def test_the_command_prints_a_family_as_json(capsys):
    memory.main(["tests.models.pipelines.tiny", "--family", "dit"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert memory.MemoryRow(**row).family == "dit"
