"""Sessions whose rows compute some tokens: what a hand-written loop gives, in any mix, and nothing left behind."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import vivace
from tests.engine.tokeny import Tokeny
from tests.engine.toy import session
from vivace.engine.executors.rehearsal import rehearsed
from vivace.engine.focusing import Together
from vivace.engine.grouping import grouped, whole
from vivace.engine.kept import KeptMemory
from vivace.engine.passes import apply_guidance, apply_tokens
from vivace.engine.request import Request
from vivace.engine.token_rows import focused, token_rows
from vivace.kernels.select_tokens.reference import select_tokens as by_definition

TOKENS = 16
CHOOSING = ("deviation", "norm", "change", "guidance", "attention", "random")


def base(steps=8, guided=True, solver="ddim", interval=(0.0, 1.0), **options):
    schedule = vivace.NoiseSchedule.vp(np.linspace(1e-4, 2e-2, 1000))
    plan = vivace.make_plan(schedule, solver, steps=steps, prediction="eps", **options)
    return apply_guidance(plan, 3.0, interval=interval) if guided else plan


def some(plan=None, keep=0.25, **options):
    return apply_tokens(base() if plan is None else plan, keep, **{"first": 2, **options})


def run(plan, toy=None, prompt="red", **options):
    toy = toy or Tokeny()
    one = session(plan, toy=toy, **options.pop("session", {}))
    toy.runs.clear()
    toy.calls.clear()
    return one(prompt, **options), toy


# --- identity ------------------------------------------------------------------------------------------------------
def test_keeping_every_token_is_the_plan_itself():
    plan = base()
    assert apply_tokens(plan, 1.0) is plan
    assert apply_tokens(plan, 0.5, first=8) is plan
    bound = plan.bind(Tokeny().spec)
    assert apply_tokens(bound, 0.99) is bound


@pytest.mark.parametrize("selector", CHOOSING)
def test_every_token_by_the_way_of_some_has_the_bits_of_the_plan(selector):
    plan = some(selector=selector).bind(Tokeny().spec)
    rows = [i for i, row in enumerate(token_rows(plan)) if row is not None]
    assert rows
    steps = list(plan.steps)
    for i in rows:
        steps[i] = replace(steps[i], variant=replace(steps[i].variant, keep=float(TOKENS)))
    every, toy = run(vivace.verify(replace(plan, steps=tuple(steps))), n=2, session={"probed": False})
    assert list(range(TOKENS)) in toy.runs
    assert torch.equal(every.latents, run(base(), n=2)[0].latents)
    assert any("no effect" in warning for warning in every.receipt.warnings)


def test_a_rehearsed_row_of_every_token_names_them():
    """A share that comes to all tokens once bound is a token row still: it reads keys and values."""
    plan, spec = some(keep=0.98).bind(Tokeny().spec), Tokeny().spec
    x = torch.zeros((2, *spec.latent_shape))
    found = [(call.focus, focused(variant)) for call, variant in rehearsed(plan, spec, x, 3.0, KeptMemory())]
    assert [None if focus is None else focus.count for focus, _ in found] == [
        TOKENS if token else None for _, token in found
    ]
    assert any(token for _, token in found)


def test_rehearsed_rows_are_handed_what_rows_are():
    """Attention received is read by selections; a network that is told of it would not be captured."""
    plan, spec = some(selector="attention").bind(Tokeny().spec), Tokeny().spec
    calls = rehearsed(plan, spec, torch.zeros((2, *spec.latent_shape)), 3.0, KeptMemory())
    sites = [{turn.use.site for turn in call.turns} for call, _ in calls if call.focus is not None]
    assert sites == [{"kv"}]


# --- what rows compute ---------------------------------------------------------------------------------------------
class ByHand:
    """The same loop without sessions: every token with its own last keys, values and predictions, in plain lists."""

    def __init__(self, plan, toy, seed=0, scale=3.0):
        self.plan, self.toy, self.scale = plan.bind(toy.spec), toy, scale
        self.tokens, self.rows = self.plan.binding.tokens, token_rows(self.plan)
        self.held, self.outs, self.ages = {}, {}, [0] * self.tokens
        self.x = vivace.engine.noise.normals(toy.spec.latent_shape, seed)
        self.x, self.chosen = torch.from_numpy(self.x), []

    def run(self, condition=3.0):
        for i, step in enumerate(self.plan.steps):
            ids = list(range(self.tokens)) if self.rows[i] is None else self.select(self.rows[i], step)
            self.chosen.append(ids)
            for p in range(self.tokens):
                self.ages[p] = 0 if p in ids else self.ages[p] + 1
            cut = {b: self.network(step, b, condition, ids) for b in step.branches}
            for branch, fresh in cut.items():
                old = self.outs.get(branch, torch.zeros_like(fresh))
                self.outs[branch] = torch.stack([fresh[p] if p in ids else old[p] for p in range(self.tokens)])
            full = {b: self.toy.joined(self.outs[b], self.x.shape) for b in step.branches}
            self.update(step, full)
        return self.x

    def network(self, step, branch, condition, ids):
        """[N, width]; rows of tokens that are left out mean nothing."""
        toy = self.toy
        h = torch.tanh(toy.cut(self.x) + 0.001 * step.timestep + (0.1 * condition if branch == "cond" else 0.0))
        h = h + 0.1 * toy.places[: self.tokens]
        for block in range(3):
            q, k, v, o, m = (toy.matrices[block, i] for i in range(5))
            keys, values = self.held.setdefault((branch, block), ([None] * self.tokens, [None] * self.tokens))
            for p in ids:
                keys[p], values[p] = h[p] @ k, h[p] @ v
            weights = torch.softmax(h @ q @ torch.stack(keys).T / 4, dim=1)
            h = h + 0.3 * (weights @ torch.stack(values)) @ o
            h = h + 0.2 * torch.tanh(h @ m)
        return 0.5 * h

    def select(self, row, step):
        """By the definition: a window of the ranking, tokens that waited nearer to it, the oldest by force."""
        keep, n = int(row.keep), self.tokens
        guided = self.outs["uncond"] + self.scale * (self.outs["cond"] - self.outs["uncond"])
        if row.selector == "guidance":
            guided = self.outs["cond"] - self.outs["uncond"]
        pixels = guided.view(n, self.toy.spec.latent_shape[0], -1).double()
        each = pixels.std(dim=1) if row.selector == "deviation" else pixels.square().sum(dim=1).sqrt()
        rank = sorted(range(n), key=lambda p: (each[p].mean().item(), p))
        lo = (n - keep) - math.floor(row.drop_high * (n - keep) + 0.5)
        far = {p: abs(2 * r - (2 * lo + keep - 1)) for r, p in enumerate(rank)}
        far = {p: np.float32(d) * np.float32(math.exp(-row.starvation * self.ages[p])) for p, d in far.items()}
        due = [row.bound - age + 1 for age in self.ages]
        force = max([0, *(sum(d <= e for d in due) - int(row.least) * (e - 1) for e in range(1, row.bound + 2))])
        oldest = sorted(range(n), key=lambda p: (-self.ages[p], far[p], p))[:force]
        others = sorted((p for p in range(n) if p not in oldest), key=lambda p: (far[p], p))
        return sorted([*oldest, *others[: keep - force]])

    def update(self, step, outs):
        slots = {"x": self.x, **dict(zip(step.outs, (outs[b] for b in step.branches), strict=True))}
        for op in step.ops:
            terms = [(slots[slot], self.scale if not isinstance(c, float) else c) for slot, c in op.terms]
            slots[op.dst] = sum(slot.double() * c for slot, c in terms)
        self.x = slots["x"].float()


@pytest.mark.parametrize("drop_high", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("selector", ["deviation", "norm", "guidance"])
def test_rows_of_some_tokens_are_what_a_hand_written_loop_gives(selector, drop_high):
    plan = some(base(9), 0.25, selector=selector, drop_high=drop_high, every=5)
    found, toy = run(plan)
    hand = ByHand(plan, Tokeny())
    expected = hand.run()
    rows = [ids for ids in toy.runs]
    assert rows == [None if len(ids) == TOKENS else ids for ids in hand.chosen]
    assert rows.count(None) == 2 + 1 + 1
    limit = 256 * 2.0**-24 * float(expected.abs().max())
    torch.testing.assert_close(found.latents[0], expected, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("shape", "patch"), [((3, 4, 12), (2, 2)), ((2, 12, 4), (4, 2)), ((2, 3, 4, 6), (1, 2, 2)), ((4, 10), (2,))]
)
@pytest.mark.parametrize("selector", ["deviation", "guidance"])
def test_latents_of_any_aspect_and_rank(shape, patch, selector):
    toy = Tokeny(shape=shape, patch=patch)
    plan = some(base(7), 0.4, selector=selector, drop_high=0.5)
    found, toy = run(plan, toy, session={"shape": shape})
    hand = ByHand(plan, Tokeny(shape=shape, patch=patch))
    expected = hand.run()
    assert [ids for ids in toy.runs if ids] == [ids for ids in hand.chosen if len(ids) < hand.tokens]
    limit = 256 * 2.0**-24 * float(expected.abs().max())
    torch.testing.assert_close(found.latents[0], expected, rtol=0, atol=limit)


@pytest.mark.parametrize("keep", [1 / TOKENS, 1 - 1 / TOKENS])
def test_the_ends_of_keep(keep):
    plan = some(base(8), keep)
    result, toy = run(plan, n=2)
    assert bool(torch.isfinite(result.latents).all())
    assert {len(ids) for ids in toy.runs if ids} == {round(keep * TOKENS)}
    assert torch.equal(result.latents, run(plan, n=2)[0].latents)


# --- mixes ---------------------------------------------------------------------------------------------------------
MULTISTEP = ("dpmpp_2m", "unipc", "deis", "ddim")
PLANS = {
    "plain": base(6),
    "deviation": some(base(7), 0.25),
    "norm": some(base(7), 0.5, selector="norm", starvation=0.5),
    "change": some(base(6), 0.25, selector="change", store="bf16"),
    "guidance": some(base(7, interval=(0.0, 0.6)), 0.25, selector="guidance"),
    "random": some(base(5), 0.75, selector="random"),
    "attention": some(base(9), 0.5, selector="attention", every=4),
    "slope": some(base(9), 0.5, slope=0.4, every=5),
    "heun": some(base(5, solver="heun"), 0.25),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_picture_chooses_for_itself(name):
    four, toy = run(PLANS[name], n=4)
    for j in range(4):
        one, alone = run(PLANS[name], n=1, index=j)
        assert torch.equal(one.latents[0], four.latents[j])
        assert alone.runs == toy.runs[j::4]
        assert name == "plain" or torch.equal(one.computed[0], four.computed[j])
    chosen = [tuple(ids) for ids in toy.runs if ids]
    assert name == "plain" or len(set(chosen)) > len(PLANS[name].steps) - 4


def test_a_request_has_the_same_bits_alone_and_in_a_mix():
    alone = {(name, k): run(plan, seed=k, n=1 + k % 2)[0].latents for name, plan in PLANS.items() for k in range(2)}
    together = session(*PLANS.values(), toy=Tokeny())
    rng, waiting, running = random.Random(0), list(alone), {}
    while waiting or running:
        if waiting and rng.random() < 0.5:
            name, k = waiting.pop(rng.randrange(len(waiting)))
            running[name, k] = together.begin(Request("red", PLANS[name], seed=k, n=1 + k % 2))
        picked = [key for key in running if rng.random() < 0.7]
        if picked:
            together.step([running[key] for key in picked])
        for key in [key for key, state in running.items() if state.done]:
            assert torch.equal(together.finish(running.pop(key)).latents, alone[key]), key
    assert together.kept.idle


def test_requests_at_other_rows_of_other_plans_share_a_launch():
    one, two = some(base(7), 0.25), some(base(9), 0.25)
    both = session(one, two, toy=Tokeny())
    states = [both.begin(Request("red", one, seed=1)), both.begin(Request("blue", two, n=2, seed=2))]
    for _ in range(3):
        both.step(states)
    both.step(states[1:])
    assert len(grouped([whole(state) for state in states])) == 1
    while not all(state.done for state in states):
        both.step([state for state in states if not state.done])
    found = [both.finish(state) for state in states]
    assert torch.equal(found[0].latents, run(one, seed=1)[0].latents)
    assert torch.equal(found[1].latents, run(two, prompt="blue", n=2, seed=2)[0].latents)
    assert torch.equal(found[1].computed, run(two, prompt="blue", n=2, seed=2)[0].computed)


def test_samples_that_run_one_by_one_have_the_same_bits():
    plan = some(base(6), 0.25)
    toy = Tokeny()
    one = session(plan, toy=toy)
    one.executor.one_by_one = "asked for by this test"
    assert torch.equal(one("red", n=3).latents, run(plan, n=3)[0].latents)
    assert {size for size, _ in toy.calls[-6:]} == {1}


def test_two_pictures_in_a_row_are_two_runs():
    for name, plan in PLANS.items():
        one = session(plan, toy=Tokeny())
        first, second = one("red", seed=1), one("blue", seed=2)
        assert torch.equal(first.latents, run(plan, seed=1)[0].latents), name
        assert torch.equal(second.latents, run(plan, prompt="blue", seed=2)[0].latents), name


def test_a_run_that_is_stopped_leaves_nothing_behind():
    both = session(*PLANS.values(), toy=Tokeny())
    for plan in PLANS.values():
        both("red", plan=plan, n=2)
    settled = both.kept.nbytes
    for k, plan in enumerate(list(PLANS.values()) * 3):
        state = both.begin(Request("red", plan, seed=k, n=1 + k % 2))
        for _ in range(k % 5):
            both.step([state])
        both.abort(state)
    assert both.kept.idle
    assert both.kept.nbytes == settled
    for name, plan in PLANS.items():
        assert torch.equal(both("red", plan=plan, seed=9).latents, run(plan, seed=9)[0].latents), name


def test_a_row_that_failed_can_be_tried_again():
    plan = some(base(7), 0.25)
    toy = Tokeny()
    one = session(plan, toy=toy)
    state = one.begin(Request("red", n=2))
    while not state.done:
        toy.broken = True
        with pytest.raises(RuntimeError, match="out of memory"):
            one.step([state])
        toy.broken = False
        one.step([state])
    assert torch.equal(one.finish(state).latents, run(plan, n=2)[0].latents)


def test_nothing_of_tokens_is_read_on_the_host(monkeypatch):
    plans = [some(base(8), 0.25, selector=selector) for selector in ("deviation", "change", "guidance")]
    toy = Tokeny()
    one = session(*plans, toy=toy)
    states = [one.begin(Request("red", plan, n=2)) for plan in plans]

    def refuse(*_):
        raise AssertionError("a tensor was read on the host")

    def watched(method):
        def call(*args):
            with monkeypatch.context() as patch:
                for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
                    patch.setattr(torch.Tensor, name, refuse)
                return method(*args)

        return call

    monkeypatch.setattr(Together, "merge", watched(Together.merge))
    monkeypatch.setattr("vivace.engine.focusing.select_tokens", by_definition)
    monkeypatch.setattr(Together, "select", watched(Together.select))
    while not states[0].done:
        one.step(states)
