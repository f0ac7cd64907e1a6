"""Lowering does what the ops say: random programs against a direct interpreter, in float64, through the fused step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import vivace
from tests.engine.plans import euler, guided_row, plan_of
from vivace.engine.lower import Given, lower_plan
from vivace.engine.noise import normals
from vivace.engine.plan import Affine, InputRef, Plan, Step, TensorRef, Transform, Variant
from vivace.engine.plan_io import tensor_infos
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError, UnsupportedError
from vivace.kernels.solver_step.table import NET, OUTPUTS, SOURCES

SHAPE = (2, 3)
SIDE_CAR = {"w": np.linspace(0.1, 1.0, 6).reshape(SHAPE), "bias": np.linspace(-1.0, 1.0, 6).reshape(SHAPE)}
INPUTS = {"strength": 0.75, "mask": torch.linspace(0.0, 1.0, 6, dtype=torch.float64).reshape(SHAPE)}


def network(x, t, branch="cond"):
    return (0.3 if branch == "cond" else -0.2) * x + 0.01 * t.view(-1, 1, 1)


class ConstantSlot(Exception):
    """A deviation is 0, or what rounding left: no two orders of summation agree on it."""


def transformed(op, slots, *params):
    """The slot of a Transform after it."""
    y = slots[op.slot]
    if op.kind == "clamp":
        return y.clamp(*params)
    if op.kind == "dynamic_threshold":
        s = torch.quantile(y.flatten(1).abs(), params[0], dim=1).clamp(1.0, params[1]).view(-1, 1, 1)
        return y.clamp(-s, s) / s
    to, of = (value.flatten(1).std(1).view(-1, 1, 1) for value in (slots[op.reads[0]], y))
    if not bool((of > 1e-4 * y.abs().max()).all()):
        raise ConstantSlot
    return params[0] * y * (to / of) + (1.0 - params[0]) * y


def interpret(plan, noise, inputs, seed=0):
    """The plan run op by op with plain tensors: what lowering must not change."""
    slots = {}

    def read(slot):
        if slot == "one":
            return torch.ones_like(noise)
        if slot == "noise:0":
            return noise
        if slot.startswith("noise:"):
            draws = [normals(SHAPE, seed, picture=j, draw=int(slot[6:])) for j in range(len(noise))]
            return torch.from_numpy(np.stack(draws)).double()
        return inputs[slot[6:]].expand_as(noise) if slot.startswith("input:") else slots[slot]

    def coefficient(coef):
        if isinstance(coef, TensorRef):
            return torch.from_numpy(SIDE_CAR[coef.key])
        return inputs.get(coef.name, coef.default) if isinstance(coef, InputRef) else coef

    def run(op):
        if isinstance(op, Affine):
            slots[op.dst] = sum(coefficient(coef) * read(slot) for slot, coef in op.terms)
        else:
            slots[op.slot] = transformed(op, slots, *(coefficient(coef) for _, coef in op.params))

    for op in plan.init:
        run(op)
    for step in plan.steps:
        if step.variant is not None:
            x, t = slots[step.x] * step.x_scale, torch.full((len(noise),), step.timestep, dtype=noise.dtype)
            for out, branch in zip(step.outs, step.variant.branches, strict=True):
                slots[out] = network(x, t, branch)
        for op in step.ops:
            run(op)
    return slots["x"]


def agrees(plan, inputs=INPUTS):
    plan = verify(plan)
    inputs = {ref.name: inputs[ref.name] for ref in plan.inputs if ref.name in inputs}
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((3, *SHAPE)))
    call = network if plan.branch_evals > plan.nfe else lambda x, t, branch="cond": network(x, t, branch)
    got = vivace.sample(call, plan, noise, inputs=inputs)
    want = interpret(plan, noise, inputs)
    assert torch.allclose(got, want, rtol=1e-11, atol=1e-11 * (1 + float(want.abs().max())))


NAMES = [f"s{i}" for i in range(7)]
number = st.sampled_from([0.0, 1.0, -0.5, 0.3, 1.25])
coef = st.one_of(
    number, number, number, st.sampled_from([TensorRef("w"), TensorRef("bias"), InputRef("strength"), InputRef("mask")])
)
source = st.sampled_from(["x", "one", "noise:0", "noise:1", "input:mask", "cond", "uncond", *NAMES])
affine = st.builds(
    lambda dst, terms: Affine(dst, tuple(terms)),
    st.sampled_from(["x", *NAMES]),
    st.lists(st.tuples(source, coef), min_size=1, max_size=5),
)
wide = st.builds(
    lambda dst, terms: Affine(dst, tuple(terms)),
    st.sampled_from(["x", *NAMES]),
    st.lists(st.tuples(source, number), min_size=13, max_size=30),
)
clamp = st.builds(
    lambda slot, low: Transform("clamp", slot, (), (("low", low), ("high", 0.8))),
    st.sampled_from(["x", *NAMES]),
    st.sampled_from([-0.5, InputRef("strength", -0.9)]),
)
threshold = st.builds(
    lambda slot, ratio, limit: Transform("dynamic_threshold", slot, (), (("ratio", ratio), ("max", limit))),
    st.sampled_from(["x", *NAMES]),
    st.sampled_from([0.0, 0.5, 0.995, 1.0, InputRef("strength", 0.9)]),
    st.sampled_from([1.0, 1.25, 100.0]),
)
rescale = st.builds(
    lambda slot, to, phi: Transform("cfg_rescale", slot, (to,), (("phi", phi),)),
    st.sampled_from(["x", *NAMES]),
    st.sampled_from(["x", "cond", "uncond", *NAMES]),
    st.sampled_from([0.0, 0.7, InputRef("strength", 0.9)]),
)
ops = st.lists(st.one_of(affine, affine, affine, wide, clamp, threshold, rescale), max_size=9)
kind = st.sampled_from([None, Variant(), Variant(branches=("cond", "uncond"))])


@st.composite
def programs(draw):
    """A legal plan of random ops; reads of slots that are still empty become reads of x."""
    live, steps = {"x"}, []

    def fill(slot):
        return slot if slot in live or ":" in slot or slot == "one" else "x"

    for i in range(draw(st.integers(1, 4))):
        variant = draw(kind)
        outs = () if variant is None else ("cond", "uncond")[: len(variant.branches)]
        for out in ("cond", "uncond"):  # an output of an earlier row may only be read with its own stamp
            live.discard(out)
        live |= set(outs)
        made = []
        for op in draw(ops):
            if isinstance(op, Affine):
                made.append(replace(op, terms=tuple((fill(slot), coef) for slot, coef in op.terms)))
                live.add(op.dst)
            else:
                made.append(replace(op, slot=fill(op.slot), reads=tuple(map(fill, op.reads))))
        steps.append(Step(float(i), 0.5, 0.5, tuple(made), variant, "x", draw(number) or 1.0, outs or ("out",)))
    return Plan(tuple(steps), "eps", (Affine("x", (("noise:0", 1.0),)),), None, tensor_infos(SIDE_CAR), arrays=SIDE_CAR)


@settings(max_examples=250, deadline=None)
@given(programs())
def test_random_programs_agree_with_the_interpreter(plan):
    try:
        agrees(plan)
    except ConstantSlot:
        reject()


def test_a_guided_row_is_one_kernel_row_that_keeps_only_what_is_read():
    plan = plan_of(guided_row(), guided_row(), prediction="eps")
    lowered = lower_plan(verify(plan), Given({"guidance_scale": 4.0}))
    assert lowered.spans == ((1, 2), (2, 3)) and lowered.start == (0, 1)
    ints = np.asarray(lowered.table.ints)
    assert ints[1, 0] == 3 and ints[1, 1] == 2  # x, cond, uncond -> x and the next network input; d, g, m0 are folded
    assert sorted(ints[1, 26:28]) == [lowered.slots["x"], NET]
    assert ints[2, 1] == 1  # the last row feeds no network


def test_history_that_is_read_later_is_written_once():
    ops = (Affine("m0", (("x", 1.0), ("out", -0.5))), Affine("x", (("x", 0.5), ("m0", 0.5))))
    later = (Affine("m1", (("x", 1.0), ("out", -0.5))), Affine("x", (("x", 0.5), ("m1", 0.75), ("m0", -0.25))))
    plan = plan_of(Step(1.0, 0.5, 0.5, ops), Step(0.5, 0.6, 0.4, later), prediction="eps")
    lowered = lower_plan(verify(plan), Given({}))
    ints, floats = np.asarray(lowered.table.ints), np.asarray(lowered.table.floats)
    assert ints[1, 1] == 3 and list(ints[1, 26:29]) == [lowered.slots["m0"], lowered.slots["x"], NET]
    assert floats[1, 48 + 4] == 0.5  # x reads the row's own m0, not its formula
    assert ints[2, 1] == 1  # m1 is not read again
    agrees(plan)


def test_rows_that_need_more_than_one_kernel_row_are_split():
    many = tuple(Affine(f"s{i}", (("x", 0.1 * i), ("out", 1.0))) for i in range(7))
    use = Affine("x", tuple((f"s{i}", 0.1) for i in range(7)))
    plan = plan_of(Step(1.0, 0.5, 0.5, many), Step(0.5, 0.5, 0.5, (use,)), prediction="eps")
    lowered = lower_plan(verify(plan), Given({}))
    assert lowered.spans[0][1] - lowered.spans[0][0] == 2
    ints = np.asarray(lowered.table.ints)
    assert ints[:, 0].max() <= SOURCES and ints[:, 1].max() <= OUTPUTS
    agrees(plan)


def test_a_blend_with_a_mask_of_the_request_is_exact():
    known = Affine("k", (("input:start", 0.8), ("noise:0", 0.6)))
    blend = (Affine("d", (("x", 1.0), ("k", -1.0))), Affine("x", (("k", 1.0), ("d", InputRef("mask")))))
    row = guided_row()
    plan = plan_of(replace(row, ops=(*row.ops, known, *blend)), prediction="eps")
    start = torch.linspace(-2.0, 2.0, 6, dtype=torch.float64).reshape(SHAPE)
    agrees(plan, {**INPUTS, "start": start})


def test_an_output_read_in_a_later_row_is_kept():
    first = Step(1.0, 0.5, 0.5, (Affine("x", (("x", 0.9),)),), outs=("early",))
    second = Step(0.5, 0.5, 0.5, (Affine("x", (("x", 1.0), ("early", 0.5)), at=0),))
    agrees(plan_of(first, second, prediction="eps"))


def test_what_the_step_cannot_do_names_the_row():
    masked = Transform("clamp", "x", (), (("low", InputRef("mask")), ("high", 1.0)))
    beyond = Transform("dynamic_threshold", "x", (), (("ratio", InputRef("strength")), ("max", 1.0)))
    for op, error in ((masked, UnsupportedError), (beyond, ArgumentError)):
        plan = plan_of(*euler(2).steps, Step(0.0, 1.0, 0.0, (op,)))
        with pytest.raises(error, match="step 2"):
            lower_plan(verify(plan), Given({"strength": 1.5}, frozenset({"mask"})))


def test_branches_that_cancel_leave_no_term():
    ops = (
        Affine("d", (("out", 1.0), ("out", -1.0))),
        Affine("g", (("out", 1.0), ("d", 7.5))),
        Affine("x", (("x", 0.5), ("g", 0.5))),
    )
    lowered = lower_plan(verify(plan_of(Step(1.0, 0.5, 0.5, ops), prediction="eps")), Given({}))
    assert np.asarray(lowered.table.floats)[1, :2].tolist() == [0.5, 0.5]


def test_missing_tensor_is_found_before_lowering():
    with pytest.raises(PlanError, match="side-car"):
        verify(plan_of(Step(1.0, 0.5, 0.5, (Affine("x", (("x", TensorRef("w")),)),))))


THRESHOLD = Transform("dynamic_threshold", "m0", (), (("ratio", 0.9), ("max", 1.5)))
RESCALE = Transform("cfg_rescale", "g", ("cond",), (("phi", 0.7),))


def reduced_row(*kinds):
    """A guided row with transforms on the guidance, on x0, or both."""
    guide, combine, *rest = guided_row().ops
    m0, x = rest
    ops = (guide, combine, *((RESCALE,) if "g" in kinds else ()), m0, *((THRESHOLD,) if "m0" in kinds else ()), x)
    return replace(guided_row(), ops=ops)


def test_a_reducing_transform_is_a_reduction_row_and_a_mark_on_its_output():
    plan = plan_of(reduced_row("m0"), guided_row(), prediction="eps")
    lowered = lower_plan(verify(plan), Given({"guidance_scale": 4.0}))
    assert lowered.spans == ((1, 3), (3, 4)) and [lowered.reduces(row) for row in range(4)] == [
        False,
        True,
        False,
        False,
    ]
    ints, floats = np.asarray(lowered.table.ints), np.asarray(lowered.table.floats)
    assert ints[1, :2].tolist() == [3, 1] and ints[1, 26] == -1  # x, cond, uncond -> y_0; guidance is folded into it
    assert (floats[1, 64], floats[1, 68]) == (0.9, 1.5)
    assert ints[2, 1] == 3 and ints[2, 30] == 1 and ints[2, 26] == lowered.slots["m0"]  # m0 adjusted, x, network input
    agrees(plan)


def test_two_reducing_transforms_in_a_row_are_two_pairs():
    plan = plan_of(reduced_row("g", "m0"), reduced_row("g"), prediction="eps")
    lowered = lower_plan(verify(plan), Given({"guidance_scale": 4.0}))
    assert lowered.spans == ((1, 5), (5, 7))
    assert [lowered.reduces(row) for row in range(1, 7)] == [True, False, True, False, True, False]
    agrees(plan)


def test_what_a_clamp_or_a_transform_made_is_not_folded_into_a_reduction():
    clamp = Transform("clamp", "m0", (), (("low", -0.5), ("high", 0.6)))
    again = replace(THRESHOLD, params=(("ratio", 0.5), ("max", 2.0)))
    row = guided_row()
    plan = plan_of(replace(row, ops=(*row.ops[:3], clamp, THRESHOLD, again, row.ops[3])), prediction="eps")
    lowered = lower_plan(verify(plan), Given({"guidance_scale": 4.0}))
    assert [lowered.reduces(row) for row in range(1, 6)] == [False, True, False, True, False]
    agrees(plan)
