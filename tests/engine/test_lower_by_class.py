"""Rows by token age become kernel rows by class: each element runs the row of its class, and nothing else changes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.plans import euler, guided_row, plan_of
from tests.engine.test_lower import SIDE_CAR
from vivace.engine.lower import Given, lower_plan
from vivace.engine.plan import Affine, AgeRef, Step, TensorRef, Transform, Variant
from vivace.engine.plan_io import tensor_infos
from vivace.engine.stepper import Stepper
from vivace.engine.verify import verify
from vivace.errors import PlanError, UnsupportedError

SHAPE, PATCH, TOKENS, CLASSES = (2, 3), (1,), 3, 4
numbers = st.sampled_from([0.0, 0.5, -1.25, 1.0, 2.0])
ages = st.tuples(*[numbers] * CLASSES).map(AgeRef)
slots = st.sampled_from(["x", "y", "z", "m0", "m1"])


@st.composite
def rows(draw, i):
    """A row whose ops mix numbers, tensors and coefficients by age, some of them more than a kernel row holds."""
    ops = []
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.integers(0, 9)) == 0:
            ops.append(Transform("clamp", draw(slots), (), (("low", -1.5), ("high", draw(numbers.map(abs))))))
            continue
        coef = st.one_of(ages, ages, numbers, st.just(TensorRef("w")))
        terms = draw(st.lists(st.tuples(st.one_of(slots, st.just("out")), coef), min_size=1, max_size=6))
        merged = {slot: coef for slot, coef in terms}
        ops.append(Affine(draw(slots), tuple(merged.items())))
    ops.append(Affine("x", (("x", draw(ages)), ("y", 0.5), ("out", draw(ages)))))
    return Step(1.0 - 0.1 * i, 0.5, 0.5, tuple(ops))


@st.composite
def plans(draw):
    first = Step(1.0, 0.5, 0.5, tuple(Affine(s, (("x", 0.3), ("out", 1.0))) for s in ("y", "z", "m0", "m1")))
    arrays = {"w": SIDE_CAR["w"]}
    steps = [first, *(draw(rows(i)) for i in range(draw(st.integers(1, 3))))]
    return verify(plan_of(*steps, prediction="eps", tensors=tensor_infos(arrays), arrays=arrays))


def network(x, row):
    return torch.sin(1.7 * x + row)


def interpreted(plan, x, classes):
    """The plan op by op, a coefficient by age as a tensor of every element's own."""
    state = {"x": x}
    for i, step in enumerate(plan.steps):
        state["out"] = network(state["x"], i)

        def of(coef, i=i):
            if isinstance(coef, AgeRef):
                return torch.tensor(coef.values, dtype=torch.float64)[classes[i].long()][:, None]
            return torch.from_numpy(plan.arrays[coef.key]) if isinstance(coef, TensorRef) else coef

        for op in step.ops:
            if isinstance(op, Affine):
                state[op.dst] = sum((of(coef) * state[slot] for slot, coef in op.terms), torch.zeros_like(x))
            else:
                low, high = (coef for _, coef in op.params)
                state[op.slot] = state[op.slot].clamp(low, high)
    return state["x"]


def run(plan, x, classes):
    stepper = Stepper(plan, x, {}, lambda: x, torch.float64, patch=PATCH)
    state = stepper.start(x)
    for i in range(len(plan.steps)):
        state = stepper.advance([network(state, i)], classes[i])
    return state


@settings(max_examples=120, deadline=None)
@given(plans(), st.integers(0, 1 << 30))
def test_every_element_runs_the_row_of_its_class(plan, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    classes = torch.randint(CLASSES, (len(plan.steps), 2, TOKENS), generator=generator, dtype=torch.uint8)
    got, want = run(plan, x, classes), interpreted(plan, x, classes)
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(0, CLASSES - 1))
def test_one_class_everywhere_is_the_plan_of_that_class(plan, number):
    """The same kernel rows, so the same bits."""

    def of(coef):
        return coef.values[number] if isinstance(coef, AgeRef) else coef

    steps = []
    for step in plan.steps:
        ops = []
        for op in step.ops:
            if isinstance(op, Affine):
                kept = [(slot, of(coef)) for slot, coef in op.terms if not isinstance(coef, AgeRef) or of(coef)]
                op = replace(op, terms=tuple(kept) or (("x", 0.0),))
            ops.append(op)
        steps.append(replace(step, ops=tuple(ops)))
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    classes = torch.full((len(plan.steps), 2, TOKENS), number, dtype=torch.uint8)
    one = replace(plan, steps=tuple(steps))
    assert torch.allclose(run(plan, x, classes), run(one, x, classes), rtol=1e-12, atol=1e-12)


def aged(*values):
    return AgeRef(values)


def test_rows_of_a_class_lie_one_after_another_and_what_all_share_is_one_row():
    wide = Affine("y", tuple((f"m{k}", 1.0) for k in range(14)))
    first = Step(1.0, 0.5, 0.5, tuple(Affine(f"m{k}", (("out", float(k)),)) for k in range(14)))
    second = Step(0.5, 0.5, 0.5, (wide, Affine("x", (("x", 0.5), ("y", aged(1.0, 0.5, 0.25))))))
    lowered = lower_plan(verify(plan_of(first, second, prediction="eps")), Given({}))
    begin, end = lowered.spans[1]
    launches = lowered.launches(lowered.spans[1])
    assert lowered.fans == {launches[-1]: 3} and launches == list(range(begin, end - 2))
    plain = lower_plan(verify(euler()), Given({}))
    assert plain.fans == {} and list(plain.launches(plain.spans[0])) == list(range(*plain.spans[0]))


@pytest.mark.parametrize("kind", ["dynamic_threshold", "cfg_rescale"])
def test_a_reduction_of_what_goes_by_age_is_refused(kind):
    params = (("ratio", 0.9), ("max", 2.0)) if kind == "dynamic_threshold" else (("phi", 0.7),)
    reads = () if kind == "dynamic_threshold" else ("out",)
    ops = (Affine("y", (("out", aged(0.0, 1.0, 1.0)),)), Affine("z", (("y", 0.5),)))
    bad = Step(0.5, 0.5, 0.5, (*ops, Transform(kind, "z", reads, params), Affine("x", (("z", 1.0),))))
    with pytest.raises(UnsupportedError, match=f"step 2: {kind} of 'z' reduces over the sample, .* age of tokens"):
        lower_plan(verify(plan_of(*euler(2).steps, bad)), Given({}))
    again = (*ops, Affine("z", (("out", 1.0),)), Transform(kind, "z", reads, params), Affine("x", (("z", 1.0),)))
    lower_plan(
        verify(plan_of(*euler(2).steps, replace(bad, ops=again))), Given({})
    )  # z is another slot's value by then


def test_a_reduction_before_rows_by_class_serves_all_of_them():
    rescale = Transform("cfg_rescale", "g", ("cond",), (("phi", 0.7),))
    ops = (
        Affine("g", (("cond", 2.0), ("uncond", -1.0))),
        rescale,
        Affine("x", (("x", 0.5), ("g", aged(0.0, 1.0, 0.5)))),
    )
    step = Step(0.5, 0.5, 0.5, ops, Variant(branches=("cond", "uncond")), outs=("cond", "uncond"))
    lowered = lower_plan(verify(plan_of(guided_row(), step)), Given({"guidance_scale": 2.0}))
    begin, end = lowered.spans[1]
    assert lowered.launches((begin, end)) == [begin, begin + 1] and lowered.fans == {begin + 1: 3}
    assert lowered.reduces(begin) and end - begin == 4
    flags = np.asarray(lowered.table.ints)[begin + 1 : end, 30]
    assert (flags != 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda step: replace(step, net_inputs=(("w", aged(1.0, 1.0, 1.0)),)), "net input 'w' goes by token age"),
        (
            lambda step: replace(step, ops=(Affine("x", (("x", aged(1.0, 2.0)),)),)),
            "has 2 ages; skipped, steady and older",
        ),
        (lambda step: replace(step, ops=(Affine("x", (("x", aged(*[1.0] * 65)),)),)), "65 ages of"),
        (
            lambda step: replace(step, ops=(Affine("x", (("x", aged(1.0, 2.0, 3.0)), ("out", aged(*[1.0] * 4)))),)),
            "has 4 ages, others have 3; use as many",
        ),
        (lambda step: replace(step, ops=(Affine("x", (("x", aged(1.0, math.inf, 3.0)),)),)), "inf"),
    ],
)
def test_ages_that_no_row_can_have_are_refused(change, message):
    plan = euler()
    with pytest.raises(PlanError, match=f"step 1: .*{message}|step 1: {message}"):
        verify(replace(plan, steps=(plan.steps[0], change(plan.steps[1]), *plan.steps[2:])))
