"""Guards decide as the engine's do, picture by picture, on the same signals."""

import numpy as np
import pytest
import torch

from vivace.engine import guards as engine
from vivace.engine.guiding import Hearers
from vivace.engine.plan import Guard, Variant
from vivace.runtime.guards import Watch, cosine

OTHER = Variant()
GUARDS = {
    "below": Guard("first_block", "below", 0.9, OTHER, (1.0, 0.0)),
    "above": Guard("modulated_input", "above", 0.8, OTHER),
    "at most two in a row": Guard("first_block", "below", 5.0, OTHER, (1.0, 2.0)),
    "accumulated": Guard("modulated_input", "accumulated_below", 2.0, OTHER, (0.3, 0.5, 0.1)),
    "accumulated itself": Guard("modulated_input", "accumulated_below", 2.5, OTHER),
    "sticky": Guard("modulated_input", "below", 0.95, OTHER, sticky=True),
}


def signals(rows=8, pictures=4):
    generator = np.random.default_rng(1)
    sizes = generator.uniform(0.2, 1.0, (rows, 1, pictures, 1, 1))
    base = generator.standard_normal((1, 2, pictures, 5, 6))
    return (base + sizes * generator.standard_normal((rows, 2, pictures, 5, 6))).astype(np.float32)


def both(guard, rows):
    ours, theirs = Watch(rows.shape[2]), engine.Watch(rows.shape[2])
    for row, signal in enumerate(rows):
        ours.decide(guard, signal, row)
        theirs.decide(guard, torch.from_numpy(signal), row)
        assert ours.stuck(guard) == theirs.stuck(guard)
    return ours, theirs


@pytest.mark.parametrize("name", GUARDS)
def test_decisions_and_values_are_those_of_the_engine(name):
    ours, theirs = both(GUARDS[name], signals())
    assert [each.fired for each in ours.decisions] == [each.fired for each in theirs.decisions]
    assert any(any(each.fired) for each in ours.decisions) and not all(all(each.fired) for each in ours.decisions)
    for mine, wanted in zip(ours.decisions, theirs.decisions, strict=True):
        assert [value is None for value in mine.values] == [value is None for value in wanted.values]
        known = [pair for pair in zip(mine.values, wanted.values, strict=True) if pair[0] is not None]
        assert np.allclose(*zip(*known, strict=True), rtol=1e-12, equal_nan=True) if known else True


def test_a_signal_that_is_not_a_number_never_fires():
    rows = signals(3)
    rows[1, :, 0] = np.nan
    ours, _ = both(Guard("first_block", "below", 1e9, OTHER, (1.0, 0.0)), rows)
    assert not ours.decisions[1].fired[0] and ours.decisions[1].fired[1]
    assert ours.decisions[1].to_dict()["values"][0] is None


def test_a_row_that_was_computed_is_what_later_ones_compare_with():
    rows, guard = signals(2), GUARDS["below"]
    ours, theirs = Watch(4), engine.Watch(4)
    ours.computed(guard, rows[0])
    theirs.computed(guard, torch.from_numpy(rows[0]))
    assert ours.decide(guard, rows[1], 1) == theirs.decide(guard, torch.from_numpy(rows[1]), 1)


@pytest.mark.parametrize("estimates", [False, True])
def test_cosines_and_estimates_are_those_of_the_engine(estimates):
    params = (2.0,) if estimates else ()
    guard = Guard("guidance_cosine", "above", 0.1, OTHER, params, not estimates)
    rows = signals(6)
    ours, theirs = Watch(4, estimates), engine.Watch(4, estimates=estimates)
    names, samples = ("cond", "uncond"), tuple((theirs.cosines, j) for j in range(4))
    for row, (cond, uncond) in enumerate(rows):
        fired = ours.recall(guard, row)
        assert fired == theirs.recall(guard, row)
        for wanted, ran in ((False, names), (True, ("cond",))):
            mine = [j for j in range(4) if fired[j] == wanted]
            if not mine:
                continue
            outs = {"cond": cond[mine], "uncond": uncond[mine] if ran == names else cond[mine]}
            found = ours.cosines.heard(names, ran, outs, mine)
            hearers = Hearers(tuple(samples[j] for j in mine))
            expected = hearers.heard(names, ran, tuple(torch.from_numpy(outs[name]) for name in names))
            assert all(np.array_equal(found[n], e.numpy()) for n, e in zip(names, expected, strict=True))
    values = [each.values for each in ours.decisions]
    assert np.allclose(values[1], theirs.decisions[1].values, rtol=1e-12)
    assert any(any(each.fired) for each in ours.decisions)


def test_the_cosine_of_nothing_is_no_number():
    assert np.isnan(cosine(np.zeros(4, np.float32), np.ones(4, np.float32)))
