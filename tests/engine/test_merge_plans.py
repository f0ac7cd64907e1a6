"""The pass that merges tokens: rules by row, ends of the share, recipes and tails, composition, legality, printing."""

import json
from dataclasses import replace

import pytest

from tests.engine.test_planners import SPEC, euler
from vivace.engine.merge_rows import merge_bytes, merge_row
from vivace.engine.passes import apply_block_cache, apply_guards, apply_guidance, apply_merge
from vivace.engine.plan import Action, Plan, Rule
from vivace.engine.planning import replan
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError

GUIDED = apply_guidance(euler(), 3.0)


def said(plan):
    """By evaluation: (blocks, share, a new map) of every merge rule."""
    rows = [merge_row(step.variant) for step in plan.steps if step.variant is not None]
    return [() if row is None else row.spans for row in rows]


@pytest.mark.parametrize(
    "arguments", [{}, {"every": 3}, {"first": 2, "last": 3}, {"cell": 3, "sites": ("attn", "mlp")}]
)
def test_plans_are_legal_bound_or_not_and_made_again_from_their_recipe(arguments, tmp_path):
    made = apply_merge(GUIDED, 0.4, importance="guidance", **arguments)
    assert made.bind(SPEC).steps == apply_merge(GUIDED.bind(SPEC), 0.4, importance="guidance", **arguments).steps
    json.dumps(made.recipe.passes[-1][1].to_dict(), allow_nan=False)
    assert replan(made.recipe) == made
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").hash == made.hash


def test_rows_between_use_the_last_map():
    made = apply_merge(euler().bind(SPEC), 0.5, every=3, first=1, last=2)
    blocks, count = (0, SPEC.blocks), euler().nfe
    wanted = [()] + [((blocks, 0.5, (i - 1) % 3 == 0),) for i in range(1, count - 2)] + [(), ()]
    assert said(made) == wanted


def test_a_branch_that_comes_later_uses_the_map_there_is():
    guided = apply_guidance(euler(), 3.0, interval=(0.3, 1.0))
    for plan in (guided, guided.bind(SPEC)):
        made = apply_merge(plan, 0.5, every=100)
        branches = [step.variant.branches for step in made.steps if step.variant is not None]
        assert branches[0] == ("cond",) and branches[-1] == ("cond", "uncond")
        assert [[fresh for *_, fresh in row] for row in said(made)] == [[True]] + [[False]] * (made.nfe - 1)


def test_a_share_of_zero_changes_no_row():
    made = apply_merge(GUIDED, 0.0)
    assert made.steps == GUIDED.steps and made.recipe.passes[-1][0] == "apply_merge"


def test_the_share_ends_where_the_destinations_are_all_that_is_left():
    apply_merge(euler(), 0.75)
    apply_merge(euler(), 8 / 9, cell=3)
    with pytest.raises(ArgumentError, match=r"share 0.76; cells of 2 need one from 0 to 0.75"):
        apply_merge(euler(), 0.76)


def test_a_tail_counts_its_own_evaluations_and_begins_with_a_new_map():
    full = apply_merge(euler(), 0.5, every=4, first=3, last=1)
    tail = full.tail(0.5)
    rows = said(tail)
    assert [len(row) for row in rows] == [1] * (len(rows) - 1) + [0]
    assert [row[0][2] for row in rows[:-1]] == [i % 4 == 0 for i in range(len(rows) - 1)]
    assert said(full.tail(1.0)) == said(full)


def test_blocks_that_a_row_gives_again_merge_nothing_there():
    cached = apply_block_cache(euler().bind(SPEC), "fora", interval=2, sites=("residual",), blocks=(1, 3))
    made = apply_merge(cached, 0.5, every=2)
    rows = said(made)
    assert rows[0] == (((0, SPEC.blocks), 0.5, True),)
    assert rows[1] == (((0, 1), 0.5, False), ((3, SPEC.blocks), 0.5, False))
    attention = apply_merge(apply_block_cache(euler().bind(SPEC), "fora", interval=2), 0.5)
    assert said(attention)[:2] == [(((0, SPEC.blocks), 0.5, True),), ()]
    both = apply_block_cache(euler().bind(SPEC), "fora", interval=2, sites=("attn",))
    assert said(apply_merge(both, 0.5, sites=("attn", "mlp")))[1] == (((0, SPEC.blocks), 0.5, True),)
    with pytest.raises(PlanError, match="is not bound; bind it first"):
        apply_merge(apply_block_cache(euler(), "fora", interval=2), 0.5)


def test_bytes_follow_from_the_plan():
    made = apply_merge(GUIDED.bind(SPEC), 0.5, blocks=(1, 3), every=2)
    tokens = SPEC.tokens()
    assert SPEC.width and merge_bytes(made) == 2 * 4 * (tokens + tokens - int(0.5 * tokens))
    guided = apply_merge(GUIDED.bind(SPEC), 0.5, blocks=(1, 3), every=2, importance="guidance")
    height, width = SPEC.latent_shape[1:]
    assert merge_bytes(guided) == merge_bytes(made) + 4 * height * width
    assert merge_bytes(GUIDED.bind(SPEC)) == 0 and merge_bytes(made.tail(0.5)) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"share": True}, "share True"),
        ({"every": 0}, "every=0"),
        ({"cell": 1}, "cell=1"),
        ({"levels": 0}, "levels=0"),
        ({"first": -1}, "first=-1"),
        ({"importance": "attention"}, "use None or 'guidance'"),
        ({"sites": ()}, "some of attn, mlp"),
        ({"sites": ("attn", "attn")}, "each once"),
        ({"blocks": (0, 99)}, "none of the model's"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        apply_merge(GUIDED.bind(SPEC), **arguments)


def test_plans_that_cannot_be():
    with pytest.raises(PlanError, match="merges tokens already"):
        apply_merge(apply_merge(euler(), 0.5), 0.5)
    with pytest.raises(PlanError, match="needs rows with branch 'uncond'"):
        apply_merge(euler(), 0.5, importance="guidance")
    guarded = apply_guards(euler(), "first_block_cache", threshold=0.1)
    with pytest.raises(PlanError, match="has a guard"):
        apply_merge(guarded, 0.5)
    with pytest.raises(PlanError, match="merges tokens in a plan with guards"):
        apply_guards(apply_merge(euler(), 0.5, last=11), "first_block_cache", threshold=0.1)


def changed(plan, row, **fields):
    """The plan with other fields of a row's variant."""
    steps = list(plan.steps)
    steps[row] = replace(steps[row], variant=replace(steps[row].variant, **fields))
    return replace(plan, steps=tuple(steps))


def rule(action=Action.COMPUTE, share=0.5, **fields):
    return Rule((0, 2), "merge", action=action, share=share, **fields)


@pytest.mark.parametrize(
    "rules, fields, message",
    [
        ([rule(Action.REUSE)], {}, "needs 1 kept value"),
        ([rule(Action.FORECAST)], {}, "FORECAST of block|action COMPUTE"),
        ([rule(order=1)], {}, "a share are all it says"),
        ([rule(store="fp32")], {}, "a share are all it says"),
        ([rule(branches=("cond",))], {}, "one map serves all branches"),
        ([rule(share=0.8)], {}, "allow 0.75 at most"),
        ([rule()], {"branches": ("uncond", "cond")}, "comes first"),
        ([rule(), Rule((0, 2), "kv", action=Action.COMPUTE)], {}, "keeps keys and values"),
        ([rule()], {"selector_params": (("merge_cell", 2.5),)}, "merge_cell=2.5"),
        ([rule()], {"selector_params": (("merge_edge", 2.0),)}, "merge_edge=2"),
        ([rule()], {"selector_params": (("merge_attn", 0.0),)}, "merges before nothing"),
    ],
)
def test_the_verifier_refuses(rules, fields, message):
    plan = GUIDED.bind(SPEC)
    with pytest.raises(PlanError, match=message):
        verify(changed(plan, 1, rules=tuple(rules), **fields))


def test_a_map_is_used_again_as_it_was_made():
    plan = changed(GUIDED.bind(SPEC), 1, rules=(rule(),))
    verify(changed(plan, 2, rules=(rule(Action.REUSE),)))
    with pytest.raises(PlanError, match="another share or cell"):
        verify(changed(plan, 2, rules=(rule(Action.REUSE, share=0.25),)))
    with pytest.raises(PlanError, match="another share or cell"):
        verify(changed(plan, 2, rules=(rule(Action.REUSE),), selector_params=(("merge_cell", 3.0),)))


def test_a_row_that_computes_some_tokens_merges_none():
    plan = changed(GUIDED.bind(SPEC), 3, rules=(rule(),), keep=4.0, selector="random")
    with pytest.raises(PlanError, match="merges tokens and computes|leave one of the two"):
        verify(plan)


def test_the_printout_says_which_blocks_merge_how_much_and_whether_anew():
    text = str(apply_merge(euler().bind(SPEC), 0.5, every=2)).splitlines()
    assert f"0:{SPEC.blocks}M.5" in text[3] and f"0:{SPEC.blocks}m.5" in text[4]
    assert "+ merge" in text[0]
