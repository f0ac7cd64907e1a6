"""Clipping, migration and rounding of one layer, against what theory says."""

import pytest
import torch

from vivace.errors import ArgumentError
from vivace.models.quantized.clip import CANDIDATES, clip_scale
from vivace.models.quantized.formats import MOST, codes, fake, scale_of, stored, token_scale
from vivace.models.quantized.gptq import _factor, gptq_codes, output_error
from vivace.models.quantized.smooth import choose_migration, migration_factors

ROWS, DEPTH, WIDTH = 256, 48, 24


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows=6, count=4000, seed=0):
    """Student's t with 3 degrees of freedom."""
    parts = draw(4, rows, count, seed=seed)
    return parts[0] / (parts[1:].square().mean(0)).sqrt()


def correlated(rows=ROWS, depth=DEPTH, seed=0):
    """Inputs whose channels lie near a plane of a quarter of their dimension."""
    mixed = draw(rows, depth // 4, seed=seed) @ draw(depth // 4, depth, seed=seed + 1)
    return mixed + 0.05 * draw(rows, depth, seed=seed + 2)


def with_outliers(seed=0):
    """Inputs with a few channels 60 times as large as the others."""
    x = draw(ROWS, DEPTH, seed=seed)
    x[:, [3, 17]] *= 60
    return x


def error_of(x, scale, p, format="int8"):
    return (x - fake(x, scale[:, None], format)).abs().pow(p).sum(1)


@pytest.mark.parametrize("format", MOST)
def test_codes_stay_in_range_and_the_largest_number_becomes_the_largest_code(format):
    x = draw(5, 64) * 7
    scale = token_scale(x, format)
    got = codes(x, scale, format)
    assert torch.equal(got.abs().amax(1), torch.full((5,), MOST[format]))
    assert torch.equal(stored(got, format).float(), got)  # nothing is lost when they are kept
    assert torch.equal(scale_of(torch.zeros(2), format), torch.ones(2))


def test_int8_rounds_half_to_even():
    assert codes(torch.tensor([0.5, 1.5, 2.5, -0.5, 999.0]), torch.tensor(1.0), "int8").tolist() == [0, 2, 2, 0, 127]


def test_the_maximum_clips_nothing_and_a_percentile_clips_its_share():
    x = draw(3, 1000)
    assert torch.equal(clip_scale(x, "max") * 127, x.abs().amax(1))
    scale = clip_scale(x, "percentile:95")
    beyond = (x.abs() > 127 * scale[:, None] * (1 + 1e-6)).sum(1)
    assert beyond.tolist() == [50, 50, 50]
    assert torch.equal(clip_scale(x, "percentile:100"), clip_scale(x, "max"))


@pytest.mark.parametrize("p", [2.0, 2.4])
def test_the_scale_of_least_error_is_the_best_of_all_candidates(p):
    x = heavy_tailed()
    found = error_of(x, clip_scale(x, f"lp:{p}"), p)
    largest = x.abs().amax(1)
    every = [error_of(x, scale_of(largest * (i / CANDIDATES), "int8"), p) for i in range(1, CANDIDATES + 1)]
    assert torch.equal(found, torch.stack(every).amin(0))


@pytest.mark.parametrize("p", [2.0, 2.4])
def test_least_error_clips_heavy_tails_and_leaves_flat_ones(p):
    x = heavy_tailed()
    most, least = clip_scale(x, "max"), clip_scale(x, f"lp:{p}")
    assert bool((least < most).all())
    assert bool((error_of(x, least, p) < error_of(x, most, p)).all())
    alone = draw(1, 100_000)
    alone[0, 7] = 20.0  # halving the range quarters the error of 99,999 numbers and costs 10^p
    least = clip_scale(alone, f"lp:{p}")
    assert float(error_of(alone, least, p)) < 0.9 * float(error_of(alone, clip_scale(alone, "max"), p))
    flat = torch.linspace(-1, 1, 4001)[None]
    assert float(clip_scale(flat, f"lp:{p}") / clip_scale(flat, "max")) > 0.98


def test_a_larger_p_clips_less():
    x = heavy_tailed()
    assert bool((clip_scale(x, "lp:2") <= clip_scale(x, "lp:2.4")).all())
    assert bool((clip_scale(x, "lp:2.4") <= clip_scale(x, "lp:8")).all())


def test_rows_of_zeros_take_one():
    for how in ("max", "percentile:99", "lp:2.4"):
        assert clip_scale(torch.zeros(2, 9), how).tolist() == [1.0, 1.0]


def test_unknown_rules_are_refused():
    for how in ("", "mean", "lp", "lp:0.5", "lp:x", "percentile:0", "percentile:101"):
        with pytest.raises(ArgumentError, match="clip"):
            clip_scale(torch.ones(1, 4), how)
    with pytest.raises(ArgumentError, match="format 'int4'"):
        clip_scale(torch.ones(1, 4), "max", "int4")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_migration_leaves_the_product_unchanged(alpha):
    x, weight = with_outliers().double(), draw(WIDTH, DEPTH, seed=3)
    b = migration_factors(x.abs().amax(0), weight, alpha).double()
    target = x @ weight.double().T
    moved = (x / b) @ (weight.double() * b).T
    assert float((moved - target).norm() / target.norm()) < 1e-13


def test_half_way_both_reach_the_geometric_mean():
    x_max, weight = with_outliers().abs().amax(0), draw(WIDTH, DEPTH, seed=3)
    b = migration_factors(x_max, weight, 0.5)
    mean = (x_max * weight.abs().amax(0)).sqrt()
    torch.testing.assert_close(x_max / b, mean)
    torch.testing.assert_close((weight * b).abs().amax(0), mean)


def test_channels_that_are_never_used_are_left_alone():
    x_max, weight = torch.tensor([0.0, 2.0, 3.0]), torch.tensor([[1.0, 0.0, 4.0]])
    b = migration_factors(x_max, weight, 0.5)
    assert b[0] == 1.0 and b[1] == 1.0 and b[2] != 1.0 and bool(b.isfinite().all())


def by_token(x, b):
    return fake(x, token_scale(x, "int8"), "int8")


def test_migration_is_chosen_for_outliers_and_not_without_need():
    weight = draw(WIDTH, DEPTH, seed=3)
    x = with_outliers()
    chosen = choose_migration(x, x.abs().amax(0), weight, by_token)
    assert chosen.alpha is not None and set(chosen.errors) == {"none", "0.3", "0.5", "0.8"}
    assert chosen.errors[f"{chosen.alpha:g}"] == min(chosen.errors.values()) < chosen.errors["none"]
    torch.testing.assert_close(chosen.of_rows(x) @ chosen.of_weight(weight).T, x @ weight.T, rtol=1e-4, atol=1e-3)
    assert torch.equal(chosen.smooth, 1.0 / chosen.b)
    plain = torch.randint(-127, 128, (ROWS, DEPTH), generator=torch.Generator().manual_seed(1)).float()
    plain[:, 0] = 127.0
    kept = choose_migration(plain, plain.abs().amax(0), weight, by_token)  # rows are exact already
    assert kept.alpha is None and kept.b is None and kept.smooth is None
    assert choose_migration(x, x.abs().amax(0), weight, by_token, alphas=()).alpha is None


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_gptq_beats_nearest_on_correlated_inputs(order):
    x, weight = correlated(), draw(WIDTH, DEPTH, seed=9)
    scale = scale_of(weight.abs().amax(1), "int8")
    moment = x.double().T @ x.double()
    nearest = output_error(weight, codes(weight, scale[:, None], "int8"), scale, moment)
    got = gptq_codes(weight, scale, x, order=order)
    better = output_error(weight, got, scale, moment)
    assert float(better.sum()) < 0.5 * float(nearest.sum())
    assert bool((better <= nearest).all())  # row by row never worse
    assert float(got.abs().max()) <= 127 and torch.equal(got, got.round())


def test_gptq_holds_on_inputs_that_it_has_not_seen():
    weight = draw(WIDTH, DEPTH, seed=9)
    mixing = draw(DEPTH // 4, DEPTH, seed=1)
    seen, fresh = (draw(2000, DEPTH // 4, seed=s) @ mixing + 0.05 * draw(2000, DEPTH, seed=s + 1) for s in (20, 30))
    scale = scale_of(weight.abs().amax(1), "int8")
    moment = fresh.double().T @ fresh.double()
    nearest = output_error(weight, codes(weight, scale[:, None], "int8"), scale, moment).sum()
    assert float(output_error(weight, gptq_codes(weight, scale, seen), scale, moment).sum()) < 0.6 * float(nearest)


def test_gptq_is_nearest_where_channels_are_independent():
    x = torch.eye(DEPTH).repeat(2, 1)
    weight = draw(WIDTH, DEPTH, seed=4)
    scale = scale_of(weight.abs().amax(1), "int8")
    assert torch.equal(gptq_codes(weight, scale, x), codes(weight, scale[:, None], "int8"))


def test_gptq_blocks_are_one_sweep(monkeypatch):
    x, weight = correlated(depth=40), draw(WIDTH, 40, seed=5)
    scale = scale_of(weight.abs().amax(1), "int8")
    whole = gptq_codes(weight, scale, x)
    monkeypatch.setattr("vivace.models.quantized.gptq.BLOCK", 7)
    assert torch.equal(gptq_codes(weight, scale, x), whole)


def test_gptq_copes_with_few_rows_and_dead_channels():
    weight = draw(WIDTH, DEPTH, seed=4)
    scale = scale_of(weight.abs().amax(1), "int8")
    nearest = codes(weight, scale[:, None], "int8")
    assert torch.equal(gptq_codes(weight, scale, torch.zeros(4, DEPTH)), nearest)
    few = draw(3, DEPTH)
    few[:, :10] = 0.0
    moment = few.double().T @ few.double()
    got = gptq_codes(weight, scale, few)
    assert bool((output_error(weight, got, scale, moment) <= output_error(weight, nearest, scale, moment)).all())
    factor = _factor(moment, 1e-300)  # damping rises until the factorization succeeds
    assert bool(factor.isfinite().all()) and torch.equal(factor, factor.triu())


def test_gptq_refuses_unknown_options():
    weight, scale, rows = draw(2, 4), torch.ones(2), draw(8, 4)
    with pytest.raises(ArgumentError, match="order 'random'"):
        gptq_codes(weight, scale, rows, order="random")
    with pytest.raises(ArgumentError, match="damping"):
        gptq_codes(weight, scale, rows, damping=0.0)
