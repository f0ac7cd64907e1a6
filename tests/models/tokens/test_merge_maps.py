"""Maps of merged tokens against a transcription of the published method, and what merging and copying back give."""

import math

import pytest
import torch

from vivace.engine.noise import philox_words
from vivace.models.tokens.merge import (
    DRAWS,
    Merged,
    MergeMap,
    best_pairs,
    cells,
    drawn_by_importance,
    drawn_per_cell,
    left_of,
    pooled,
)

GRIDS = [(4, 4), (5, 7), (6, 9), (2, 8), (9, 2)]
SHARES = [0.1, 0.3, 0.5, 0.75]


def transcribed(metric, w, h, sx, sy, r, picks):
    """Bipartite soft matching of ToMe for Stable Diffusion, as its paper and code have it, for a batch [B, N, C].

    picks: [h // sy, w // sx], which token of a cell is its destination. Returns (merge, unmerge).
    """
    B, N, _ = metric.shape
    hsy, wsx = h // sy, w // sx
    idx_buffer = torch.zeros(hsy, wsx, sy * sx, dtype=torch.int64)
    idx_buffer.scatter_(2, picks[:, :, None], -torch.ones(hsy, wsx, 1, dtype=torch.int64))
    idx_buffer = idx_buffer.view(hsy, wsx, sy, sx).transpose(1, 2).reshape(hsy * sy, wsx * sx)
    whole = torch.zeros(h, w, dtype=torch.int64)
    whole[: hsy * sy, : wsx * sx] = idx_buffer
    rand_idx = whole.reshape(1, -1, 1).argsort(dim=1, stable=True)
    num_dst = hsy * wsx
    a_idx, b_idx = rand_idx[:, num_dst:, :], rand_idx[:, :num_dst, :]

    def split(x):
        C = x.shape[-1]
        return (
            x.gather(1, a_idx.expand(B, N - num_dst, C)),
            x.gather(1, b_idx.expand(B, num_dst, C)),
        )

    metric = metric / metric.norm(dim=-1, keepdim=True)
    a, b = split(metric)
    scores = a @ b.transpose(-1, -2)
    r = min(a.shape[1], r)
    node_max, node_idx = scores.max(dim=-1)
    edge_idx = node_max.argsort(dim=-1, descending=True, stable=True)[..., None]
    unm_idx, src_idx = edge_idx[..., r:, :], edge_idx[..., :r, :]
    dst_idx = node_idx[..., None].gather(-2, src_idx)

    def merge(x):
        src, dst = split(x)
        n, t1, c = src.shape
        unm = src.gather(-2, unm_idx.expand(n, t1 - r, c))
        src = src.gather(-2, src_idx.expand(n, r, c))
        dst = dst.scatter_reduce(-2, dst_idx.expand(n, r, c), src, reduce="mean")
        return torch.cat([unm, dst], dim=1)

    def unmerge(x):
        unm_len = unm_idx.shape[1]
        unm, dst = x[..., :unm_len, :], x[..., unm_len:, :]
        _, _, c = unm.shape
        src = dst.gather(-2, dst_idx.expand(B, r, c))
        out = torch.zeros(B, N, c, dtype=x.dtype)
        out.scatter_(-2, b_idx.expand(B, num_dst, c), dst)
        a = a_idx.expand(B, a_idx.shape[1], 1)
        out.scatter_(-2, a.gather(1, unm_idx).expand(B, unm_len, c), unm)
        out.scatter_(-2, a.gather(1, src_idx).expand(B, r, c), src)
        return out

    return merge, unmerge


def hidden_of(tokens, width=16, seed=0):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def map_of(hidden, grid, share, cell=2, numbers=(3, 1, 4)):
    """(merged, left) by the map of one picture's hidden states."""
    left = left_of(grid, cell, share)
    place, origin = best_pairs(hidden, drawn_per_cell(grid, cell, *numbers), left)
    return Merged(MergeMap(place[None], origin[None])), left


@pytest.mark.parametrize("cell", [2, 3])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_map_is_that_of_the_published_method(grid, share, cell):
    tokens, (h, w) = math.prod(grid), grid
    if not cells(grid, cell):
        assert left_of(grid, cell, share) == tokens
        return
    hidden = hidden_of(tokens)
    maps, left = map_of(hidden, grid, share, cell)
    drawn = drawn_per_cell(grid, cell, 3, 1, 4)
    chosen = torch.zeros(h, w, dtype=torch.bool).flatten().index_fill_(0, drawn, True).view(h, w)
    within = chosen[: h // cell * cell, : w // cell * cell]
    picks = within.reshape(h // cell, cell, w // cell, cell).transpose(1, 2).flatten(2).int()
    assert bool((picks.sum(dim=2) == 1).all())
    merge, unmerge = transcribed(hidden[None], w, h, cell, cell, int(tokens * share), picks.argmax(dim=2))
    # small integers: sums are exact in any order
    x = torch.randint(-9, 10, (1, tokens, 5), generator=torch.Generator().manual_seed(1)).float()
    ours, theirs = maps.merge(x), merge(x)
    assert ours.shape[1] == left == theirs.shape[1]
    assert torch.equal(maps.unmerge(ours), unmerge(theirs))
    assert sorted(map(tuple, ours[0].tolist())) == sorted(map(tuple, theirs[0].tolist()))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_largest_share_leaves_the_destinations(grid):
    maps, left = map_of(hidden_of(math.prod(grid)), grid, 0.75)
    assert left == max(math.prod(grid) - int(0.75 * math.prod(grid)), cells(grid, 2))
    if math.prod(grid) == 4 * cells(grid, 2):
        assert torch.equal(maps.origin[0], drawn_per_cell(grid, 2, 3, 1, 4))


def test_what_merges_is_a_mean_that_all_its_tokens_are_given():
    grid, x = (6, 6), hidden_of(36, 7, seed=5).double()
    maps, left = map_of(hidden_of(36), grid, 0.6)
    y = maps.merge(x[None])
    place = maps.unmerge(torch.arange(left)[None, :, None])[0, :, 0]
    for token in range(left):
        torch.testing.assert_close(y[0, token], x[place == token].mean(dim=0))
        assert int(maps.origin[0, token]) in torch.nonzero(place == token).flatten().tolist()
    assert torch.equal(maps.unmerge(y)[0], y[0][place])
    alone = torch.bincount(place, minlength=left)[place] == 1
    assert torch.equal(maps.unmerge(y)[0][alone], x[alone])


def test_rows_of_several_maps_are_those_of_each():
    grid, rows = (5, 6), [hidden_of(30, seed=seed) for seed in range(3)]
    pairs = [best_pairs(row, drawn_per_cell(grid, 2, 7, j, 0), 15) for j, row in enumerate(rows)]
    together = Merged(MergeMap(*(torch.stack(parts) for parts in zip(*pairs, strict=True))))
    x = torch.stack([hidden_of(30, 4, seed=9 + seed) for seed in range(3)]).bfloat16()
    y = together.merge(x)
    assert y.dtype == torch.bfloat16
    for j, (place, origin) in enumerate(pairs):
        single = Merged(MergeMap(place[None], origin[None]))
        assert torch.equal(single.merge(x[j : j + 1]), y[j : j + 1])
        assert torch.equal(single.unmerge(y[j : j + 1]), together.unmerge(y)[j : j + 1])


def test_means_of_low_precision_are_rounded_once():
    maps, _ = map_of(hidden_of(36), (6, 6), 0.7)
    x = hidden_of(36, 8, seed=3).bfloat16()[None]
    assert torch.equal(maps.merge(x), maps.merge(x.float()).bfloat16())


def test_draws_are_those_of_the_generator_and_of_their_own_numbers():
    grid, cell = (7, 9), 3
    drawn = drawn_per_cell(grid, cell, 5, 2, 11).tolist()
    words = philox_words(5, 2, DRAWS + 11, 6)
    wanted = []
    for k, word in enumerate(words.tolist()):
        y, x = divmod(k, 3)
        dy, dx = divmod(word * cell * cell >> 32, cell)
        wanted.append((y * cell + dy) * grid[1] + x * cell + dx)
    assert drawn == sorted(wanted)
    others = [(5, 2, 12), (5, 3, 11), (6, 2, 11)]
    assert all(
        drawn_per_cell((16, 16), 2, *n).tolist() != drawn_per_cell((16, 16), 2, 5, 2, 11).tolist() for n in others
    )


def test_importance_draws_within_the_pool_of_the_most_important():
    grid = (6, 8)
    importance = torch.rand(48, generator=torch.Generator().manual_seed(0))
    drawn = drawn_by_importance(importance, 12, 5, 0, 3)
    pool = importance.argsort(descending=True)[:24].tolist()
    words = philox_words(5, 0, DRAWS + 3, 48).tolist()
    assert drawn.tolist() == sorted(sorted(pool, key=words.__getitem__)[:12])
    assert drawn_by_importance(importance, 12, 5, 0, 4).tolist() != drawn.tolist()
    place, origin = best_pairs(hidden_of(48), drawn, left_of(grid, 2, 0.75))
    assert torch.equal(origin, drawn) and int(place.max()) == 11


def test_importance_is_pooled_to_the_grid_of_a_layer():
    plane = torch.arange(48.0).view(6, 8)
    assert torch.equal(pooled(plane, (3, 4)), plane.view(3, 2, 4, 2).mean(dim=(1, 3)).flatten())
    assert pooled(plane, (5, 3)).shape == (15,)
    assert torch.equal(pooled(plane.flatten(), (6, 8)), plane.flatten())


def test_equal_similarities_merge_in_the_order_of_the_grid():
    hidden = torch.ones(16, 4)
    place, origin = best_pairs(hidden, torch.tensor([1, 3, 9, 15]), 10)
    gone = [0, 2, 4, 5, 6, 7]
    assert origin.tolist() == [token for token in range(16) if token not in gone]
    assert place[gone].tolist() == [0] * 6  # token 1, the first destination


def test_tokens_of_no_length_merge_as_any_other():
    place, _ = best_pairs(torch.zeros(16, 4), torch.tensor([1, 3, 9, 15]), 4)
    assert sorted(set(place.tolist())) == [0, 1, 2, 3]
