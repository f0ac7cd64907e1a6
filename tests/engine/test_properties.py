"""Properties over random plans: legality, binding, lowering and the file form."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.plans import edit
from tests.engine.strategies import BLOCKS, SHAPE, plans, specs
from tests.engine.test_lower import SIDE_CAR, programs
from vivace.engine.bind import normal_form
from vivace.engine.lower import Given, lower_plan
from vivace.engine.plan import (
    Action,
    Affine,
    AgeRef,
    Args,
    Guard,
    InputRef,
    Plan,
    Recipe,
    Rule,
    TensorRef,
    Transform,
    Variant,
)
from vivace.engine.plan_codec import decode, parse
from vivace.engine.plan_io import canonical
from vivace.engine.verify import MAX_BLOCKS, MAX_OPS, MAX_RULES, MAX_TERMS, verify
from vivace.errors import PlanError
from vivace.kernels.solver_step.table import COEF_AT, NET, NOISE, ONE, OUT, OUTPUTS, SOURCES, TENSOR

NAN, INF = math.nan, math.inf


def variant(plan, **changes):
    """The plan with the variant of its second row changed; no guard, so that the row alone decides."""
    return edit(plan, 1, variant=replace(plan.steps[1].variant, **changes), guard=None)


def first(plan, **changes):
    return edit(plan, 0, variant=replace(plan.steps[0].variant, **changes))


def ruled(*rules):
    return lambda plan: variant(plan, rules=rules)


def op(*made):
    return lambda plan: edit(plan, 1, ops=(*plan.steps[1].ops, *made))


def coef(value):
    return op(Affine("y", (("x", value),)))


def row(**changes):
    return lambda plan: edit(plan, 1, **changes)


def guarded(*args):
    return lambda plan: edit(plan, 1, guard=Guard(*args))


def info(**changes):
    return lambda plan: replace(plan, tensors=(replace(plan.tensors[0], **changes), *plan.tensors[1:]))


def bound(**changes):
    def change(plan):
        plan = replace(plan, tensors=(), steps=tuple(replace(s, ops=(Affine("x", (("x", 1.0),)),)) for s in plan.steps))
        plan = first(plan, rules=(Rule((0, 0), "kv", action=COMPUTE),))
        plan = variant(plan, rules=(Rule((0, 0), "kv", action=REUSE),), keep=0.5, selector="random")
        plan = replace(plan, steps=tuple(replace(s, guard=None) for s in plan.steps[:2]))
        made = plan.bind(specs_of(plan))
        return replace(made, binding=replace(made.binding, **changes))

    return change


def specs_of(plan):
    from vivace.engine.bind import ModelSpec

    return ModelSpec("toy", "f" * 64, plan.prediction, SHAPE, BLOCKS, (4, 4), token_group=2)


COMPUTE, REUSE, FORECAST = Action.COMPUTE, Action.REUSE, Action.FORECAST
OTHER = (Rule((0, 1), "mlp", action=COMPUTE),)
# Every rule of the verifier: how to break it -> what the message says.
BREAKS = {
    "unknown prediction": (lambda p: replace(p, prediction="score"), "prediction 'score'"),
    "no rows": (lambda p: replace(p, steps=()), "no rows"),
    "init with a transform": (lambda p: replace(p, init=(*p.init, Transform("clamp", "x"))), "only Affine"),
    "init from a later draw": (lambda p: replace(p, init=(Affine("x", (("noise:1", 1.0),)),)), "noise:0"),
    "result never written": (lambda p: replace(p, steps=(replace(p.steps[0], x="z", ops=(), restart=False),),
                                               init=(Affine("z", (("noise:0", 1.0),)),)), "slot 'x'"),  # fmt: skip
    "empty slot": (op(Affine("y", (("nothing", 1.0),))), "empty slot 'nothing'"),
    "network reads an empty slot": (row(x="nothing"), "empty slot 'nothing'"),
    "timestep": (row(timestep=NAN), "timestep is nan"),
    "alpha": (row(alpha=INF), "alpha is inf"),
    "x_scale": (row(x_scale=1), "x_scale is int"),
    "forecast weight": (row(forecast=(NAN,)), "forecast weight"),
    "negative level": (row(alpha=-0.5), "both >= 0"),
    "no level": (row(alpha=0.0, sigma=-0.0), "not both 0"),
    "extreme level": (row(sigma=5e-324), "1e-100"),
    "rising noise": (lambda p: edit(edit(p, 0, alpha=1.0, sigma=0.0), 1, alpha=0.1, sigma=1.0, restart=False), "rises"),
    "reserved slot": (op(Affine("one", (("x", 1.0),))), "reserved"),
    "slot name": (op(Affine("Y", (("x", 1.0),))), "slot name 'Y'"),
    "no terms": (op(Affine("y", ())), "no terms"),
    "too many terms": (op(Affine("y", (("x", 1.0),) * (MAX_TERMS + 1))), "at most"),
    "too many ops": (op(*[Affine("y", (("x", 1.0),))] * MAX_OPS), "at most"),
    "too many slots": (lambda p: edit(replace(p, steps=p.steps[:1]), 0, ops=[wide(i) for i in range(60)]), "slots"),
    "draw out of range": (op(Affine("y", (("noise:9999999999", 1.0),))), "draws go to"),
    "stamped later": (op(Affine("y", (("x", 1.0),), 9)), "stamped row 9"),
    "stamped wrong": (op(Affine("y", (("cond", 1.0),), 0)), "an output of row 1"),
    "coefficient": (coef(NAN), "is nan"),
    "integer coefficient": (coef(2), "is int"),
    "missing tensor": (coef(TensorRef("none")), "side-car lacks"),
    "input name": (coef(InputRef("W")), "input 'W'"),
    "input default": (coef(InputRef("w", INF)), "default of input"),
    "no ages": (coef(AgeRef(())), "has 0 ages"),
    "age": (coef(AgeRef((1.0, 1.0, 1.0, NAN))), "is nan"),
    "transform": (op(Transform("blur", "x")), "'blur'"),
    "transform parameters": (op(Transform("clamp", "x", (), (("high", 1.0), ("low", 0.0)))), "takes parameters"),
    "crossed clamp": (op(Transform("clamp", "x", (), (("low", 1.0), ("high", 0.0)))), "exceed"),
    "net input": (row(net_inputs=(("w", NAN),)), "net input"),
    "net input name": (row(net_inputs=(("a\nb", 1.0),)), "printable"),
    "outs": (row(outs=("a", "b", "c")), "one slot per branch"),
    "branches": (lambda p: edit(variant(p, branches=("uncond",), rules=()), 1, outs=("uncond",)), "need 'cond'"),
    "model": (lambda p: variant(p, model=""), "model is named"),
    "selector": (lambda p: variant(p, selector="a\0"), "selector is named"),
    "selector parameter": (lambda p: variant(p, selector_params=(("a", NAN),)), "selector parameter 'a'"),
    "keep": (lambda p: variant(p, keep=1.5), "0 < keep <= 1"),
    "first row full": (lambda p: first(p, keep=0.5), "must be full"),
    "reuse in the first row": (lambda p: first(p, rules=(Rule((0, 1), action=REUSE),)), "must be full"),
    "reuse before compute": (ruled(Rule((5, 6), action=REUSE)), "needs 1 kept"),
    "forecast before two": (ruled(Rule((1, 2), action=FORECAST, order=1)), "needs 2 kept"),
    "forecast weights": (lambda p: row(forecast=())(ruled(Rule((1, 2), action=FORECAST))(p)), "needs 1 weights"),
    "caches cross models": (lambda p: variant(p, model="two", rules=(Rule((1, 2), action=REUSE),)), "of model 'two'"),
    "conflict": (ruled(Rule((0, 4), precision="bf16"), Rule((3, 5), precision="int8")), "two values"),
    "empty range": (ruled(Rule((2, 2))), "first < last"),
    "huge range": (ruled(Rule((0, MAX_BLOCKS + 1))), "at most"),
    "too many rules": (ruled(*OTHER * (MAX_RULES + 1)), "at most"),
    "site": (ruled(Rule((0, 1), "norm")), "site 'norm'"),
    "rule branches": (ruled(Rule((0, 1), branches=("perturbed",))), "rule on branches"),
    "rule branches twice": (ruled(Rule((0, 1), branches=("cond", "cond"))), "each once"),
    "order alone": (ruled(Rule((0, 1), order=1)), "goes with COMPUTE"),
    "precision": (ruled(Rule((0, 1), precision="fp4")), "precision 'fp4'"),
    "store": (ruled(Rule((0, 1), store="float")), "store 'float'"),
    "share": (ruled(Rule((0, 1), share=0.0)), "0 < share"),
    "guard rule": (guarded("m", "near", 0.5, Variant()), "guard rule 'near'"),
    "guard threshold": (guarded("m", "above", NAN, Variant()), "guard threshold"),
    "guard metric": (guarded("", "above", 0.5, Variant()), "metric is named"),
    "guard branches": (guarded("m", "above", 0.5, Variant(branches=("cond", "perturbed"))), "agree on slots"),
    "guard alone": (row(variant=None, ops=(), guard=Guard("m", "above", 0.5, Variant())), "nothing to choose"),
    "tensor key": (info(key="../x"), "a key is made"),
    "tensor twice": (info(key="w.0"), "share a key"),
    "tensor shape": (info(shape=(3, 0)), "all positive"),
    "tensor size": (info(shape=(1 << 31, 1 << 31)), "elements"),
    "tensor dtype": (info(dtype="int8"), "dtype 'int8'"),
    "tensor hash": (info(sha256="00"), "64 hexadecimal"),
    "binding sizes": (bound(token_group=0), "positive"),
    "binding blocks": (bound(blocks=MAX_BLOCKS + 1), "at most"),
    "bound keep": (bound(token_group=3), "token group 3"),
    "bound keep above": (bound(tokens=2), "0 < keep <= 2"),
}  # fmt: skip


def wide(i):
    return Affine(f"s{i}", tuple((f"input:t{i}_{j}", 1.0) for j in range(8)))


@settings(max_examples=150, deadline=None)
@given(plans())
def test_random_plans_are_legal(plan):
    assert verify(plan) is plan
    assert str(plan)


@pytest.mark.parametrize("rule", BREAKS)
@settings(max_examples=6, deadline=None)
@given(plan=plans())
def test_every_rule_fires(rule, plan):
    change, says = BREAKS[rule]
    with pytest.raises(PlanError) as caught:
        verify(change(plan))
    message = str(caught.value)
    assert says in message and len(message.splitlines()) == 1, message


# --- binding ---------------------------------------------------------------------------------------------------------
def meaning(rules, branches, blocks):
    """{(block, site, branch): {field: value}}: what rules say, block by block."""
    cells = {}
    for rule in rules:
        a, b = rule.blocks
        a, b = (a + blocks, (b + blocks) if b < 0 else (b or blocks)) if a < 0 else (a, b + blocks if b <= 0 else b)
        fields = {n: getattr(rule, n) for n in ("action", "order", "store", "precision", "share")}
        said = {n: v for n, v in fields.items() if v not in (None, 0, 1.0) or n == "action" and v is not None}
        for branch in rule.branches or branches:
            for block in range(a, b):
                cells.setdefault((block, rule.site, branch), {}).update(said)
    return {cell: said for cell, said in cells.items() if said}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_binding_keeps_the_meaning_in_normal_form(data):
    plan = data.draw(plans())
    spec = data.draw(specs(plan.prediction))
    try:
        made = plan.bind(spec)
    except PlanError as error:  # a forecast of blocks that only the model's size shows to be unkept, or two values
        assert "needs" in str(error) or "two values" in str(error)
        return
    tokens, group = spec.tokens(), spec.token_group
    assert made.bind(spec) is made and replace(plan, steps=made.steps, binding=made.binding) == made
    for old, new in zip(plan.steps, made.steps, strict=True):
        rules, keep = new.variant.rules, new.variant.keep
        assert meaning(rules, new.branches, BLOCKS) == meaning(old.variant.rules, old.branches, BLOCKS)
        assert normal_form(rules, new.branches) == rules
        assert keep == tokens or keep % group == 0
        assert keep == tokens or keep == group or abs(keep - old.variant.keep * tokens) <= group / 2
        assert (keep == tokens) if old.variant.keep == 1.0 else 0 < keep <= tokens
        assert replace(new, variant=old.variant, guard=old.guard) == old


# --- lowering --------------------------------------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(programs())
def test_lowered_rows_read_only_what_is_written_and_fit_the_kernel(plan):
    given_tensors = frozenset({"mask"})
    lowered = lower_plan(verify(plan), Given({"strength": 0.5}, given_tensors), {"w": 0, "bias": 1})
    ints, floats = np.asarray(lowered.table.ints), np.asarray(lowered.table.floats)
    assert ints[:, 0].max(initial=0) <= SOURCES and ints[:, 1].max(initial=0) <= OUTPUTS
    spans = [lowered.start, *lowered.spans]
    assert (
        spans[0][0] == 0
        and spans[-1][1] == len(ints)
        and all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    )
    written = {code for name, code in lowered.slots.items() if name.startswith("input:")}
    for (low, high), step in zip(spans, (None, *plan.steps), strict=True):
        branches = 0 if step is None or step.variant is None else len(step.outs)
        if branches:
            assert NET in written
            written.discard(NET)
        for n in range(low, high):
            sources, outputs = ints[n, :2]
            coefs = floats[n, COEF_AT : COEF_AT + OUTPUTS * SOURCES].reshape(OUTPUTS, SOURCES)[:outputs]
            read = [j for j in range(sources) if coefs[:, j].any()]
            for code in (*ints[n, 2:14][read], *ints[n, 14:26][read]):
                if code < OUT:
                    assert code == -1 or code in written, f"row {n} reads slot {code}"
                elif code < ONE:
                    assert code - OUT < branches
                else:
                    assert code == ONE or code - TENSOR < len(SIDE_CAR) or code >= NOISE
            to = list(ints[n, 26 : 26 + outputs])
            if ints[n, 31]:  # a reduction row writes nothing and is followed by the row that uses it
                assert to == [-1] * ints[n, 31] and n + 1 < high and ints[n + 1, 30]
                continue
            assert len(set(to)) == len(to) and all(code == NET or code in lowered.slots.values() for code in to)
            written.update(to)
    assert lowered.slots["x"] in written


# --- files -----------------------------------------------------------------------------------------------------------
CHANGES = [
    lambda p: p,
    lambda p: replace(p, prediction="v"),
    lambda p: edit(p, 0, timestep=math.nextafter(p.steps[0].timestep, 0.0)),
    lambda p: edit(p, 0, timestep=-p.steps[0].timestep),
    lambda p: edit(p, 1, guard=None),
    lambda p: edit(p, 1, net_inputs=()),
    lambda p: edit(p, 1, variant=replace(p.steps[1].variant, keep=1.0)),
    lambda p: edit(p, 1, ops=p.steps[1].ops[::-1]),
    lambda p: edit(p, 1, x_scale=1.0),
    lambda p: replace(p, steps=p.steps[::-1]),
    lambda p: replace(p, init=(Affine("x", (("noise:0", 0.0),)),)),
    lambda p: replace(p, init=(Affine("x", (("noise:0", -0.0),)),)),
    lambda p: replace(p, recipe=None),
    lambda p: replace(p, recipe=Recipe("make_plan", Args.of({"a": 1}))),
    lambda p: replace(p, recipe=Recipe("make_plan", Args.of({"a": 1.0}))),
    lambda p: replace(p, recipe=Recipe("make_plan", Args.of({"a": True}))),
    lambda p: replace(p, tensors=p.tensors[:1]),
]


def identity(plan):
    """A text that is the same for the same plan to the bit: -0.0 is not 0.0, 1 is neither 1.0 nor True."""
    return repr(plan)


@settings(max_examples=200, deadline=None)
@given(plans())
def test_random_plans_survive_the_file_form(plan):
    back = decode(parse(canonical(plan)))
    assert identity(back) == identity(plan) and canonical(back) == canonical(plan) and back.hash == plan.hash


@settings(max_examples=40, deadline=None)
@given(plans(), st.sampled_from(CHANGES))
def test_hashes_are_equal_for_equal_plans_only(plan, change):
    other = change(plan)
    assert (other.hash == plan.hash) == (identity(other) == identity(plan))


@settings(max_examples=25, deadline=None)
@given(plan=plans())
def test_random_plans_survive_a_file(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan.save(path)
    back = Plan.load(path)
    assert identity(back) == identity(plan) and back.hash == plan.hash
    assert all(np.array_equal(back.arrays[key], array) for key, array in plan.arrays.items())
