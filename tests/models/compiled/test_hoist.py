"""Modulation made before the loop: the network's own, every row with the same bits however many there are."""

import copy

import pytest
import torch

from vivace.kernels.spec import within_tolerance
from vivace.models.compiled.hoist import modulation_table
from vivace.models.dit import DiT

TIMES, LABELS = [999.0, 741.5, 20.0, 0.0, 3.25], [4, 10, 0]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def model(request, tiny_folder):
    return DiT.load(tiny_folder, request.param)


def conditioned(model, kind=None):
    """What `DiT.condition` gives, in the layout of the table."""
    times = torch.tensor(TIMES, dtype=torch.float64)
    made = model.condition(times, torch.tensor(LABELS)[:, None].expand(3, len(TIMES)))
    blocks, final = (part.to(kind or part.dtype).clone() for part in made)
    blocks[:, :, :, 1::3] -= 1
    final[:, :, 1] -= 1
    return torch.cat([blocks.permute(2, 1, 0, 3, 4).flatten(2, 3), final.transpose(0, 1)], dim=2)


def test_the_table_is_what_the_network_conditions_on(model):
    table = modulation_table(model, TIMES, LABELS)
    layers, width = model.config.layers, model.config.width
    assert table.shape == (5, 3, 6 * layers + 2, width)
    assert table.dtype == (torch.float64 if model.dtype == torch.float64 else torch.float32)
    exact = conditioned(copy.deepcopy(model).double())
    holds, error, bound = within_tolerance(table.to(model.dtype), conditioned(model), exact)
    assert holds, (error, bound)


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_has_the_same_bits_however_many_there_are(model, threads, count):
    threads(count)
    whole = modulation_table(model, TIMES * 5, LABELS)
    for s in (0, 3, 4):
        for b in (0, 2):
            assert torch.equal(modulation_table(model, TIMES[s : s + 1], LABELS[b : b + 1])[0, 0], whole[s, b])
            assert torch.equal(whole[s + 20, b], whole[s, b])
    assert torch.equal(modulation_table(model, TIMES, LABELS[::-1]), whole[:5].flip(1))
