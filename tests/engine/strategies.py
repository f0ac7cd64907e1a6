"""Random legal plans for property tests."""

import math
import string
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from vivace.engine.bind import ModelSpec
from vivace.engine.plan import (
    PREDICTIONS,
    Action,
    Affine,
    AgeRef,
    Args,
    Guard,
    InputRef,
    Plan,
    Recipe,
    Rule,
    Step,
    TensorRef,
    Transform,
    Variant,
)
from vivace.engine.plan_io import tensor_infos

SHAPE = (3, 8, 8)
ARRAYS = {"mean": np.linspace(-1, 1, 192, dtype=np.float32).reshape(SHAPE), "w.0": np.ones(SHAPE)}
BLOCKS = 6  # every rule of a random plan fits a model of as many
numbers = st.floats(allow_nan=False, allow_infinity=False)
small = st.floats(-4.0, 4.0)
names = st.text(string.ascii_lowercase, min_size=1, max_size=6)
coefs = st.one_of(
    numbers,
    small,
    st.builds(InputRef, names, st.none() | numbers),
    st.sampled_from([TensorRef("mean"), TensorRef("w.0")]),
    st.builds(lambda ages: AgeRef(tuple(ages)), st.lists(numbers, min_size=4, max_size=4)),
)


def sorted_dict(data):
    """Keys in order: the order of arguments is no part of a plan's hash."""
    return dict(sorted(data.items()))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | numbers | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3).map(sorted_dict),
    max_leaves=6,
)


recipes = st.builds(
    lambda maker, arguments, tail: Recipe(maker, Args.of(sorted_dict(arguments)), tail, (("apply_guidance", Args()),)),
    st.sampled_from(["make_plan", "from_diffusers"]),
    st.dictionaries(names, json_values, max_size=3),
    st.none() | small,
)


@st.composite
def spans(draw, blocks=BLOCKS):
    """A half-open range of blocks, from the start or from the end."""
    first = draw(st.integers(0, blocks - 1))
    last = draw(st.integers(first + 1, blocks))
    return draw(st.sampled_from([(first, last), (first - blocks, last - blocks)]))


@st.composite
def cache_rules(draw, i, branches):
    """COMPUTE keeps two values in the first rows, REUSE and FORECAST read them later; and a rule on precision."""
    span = (1, 4)
    actions = [Rule(span, action=Action.COMPUTE, order=1)]
    if i > 1:
        actions += [Rule((2, 4), action=Action.REUSE), Rule(span, action=Action.FORECAST, order=1)]
    precise = Rule(draw(spans()), draw(st.sampled_from(["block", "attn"])), draw(st.sampled_from([None, branches[:1]])),
                   precision=draw(st.sampled_from(["bf16", "int8"])))  # fmt: skip
    return (draw(st.sampled_from(actions)) if i > 1 else actions[0], precise)


@st.composite
def token_rules(draw):
    """Of a row that computes some tokens: keys and values are read; perhaps blocks are given again."""
    keys = Rule((0, 0), "kv", action=Action.REUSE)
    return (Rule((2, 4), action=Action.REUSE), keys) if draw(st.booleans()) else (keys,)


@st.composite
def rows(draw, i, branches, level, last):
    """Row i: conversion to m0 or m1, history, perhaps noise, an input, a clamp; a guard now and then."""
    some = i > 1 and draw(st.booleans())
    rules = draw(token_rules() if some else cache_rules(i, branches))
    rules = rules if i else (*rules, Rule((0, 0), "kv", action=Action.COMPUTE))
    variant = Variant("main", branches, rules)
    if some:
        said = ((), (("bound", 12.0), ("starvation", draw(st.floats(0.0, 1.0)))))
        selector = draw(st.sampled_from(["deviation", "norm", "random"]))
        variant = replace(
            variant, keep=draw(st.floats(0.1, 1.0)), selector=selector, selector_params=draw(st.sampled_from(said))
        )
    now, before = f"m{i % 2}", f"m{1 - i % 2}"
    ops = [
        Affine(now, (("x", draw(small)), *((out, draw(coefs)) for out in branches)), draw(st.sampled_from([None, i])))
    ]
    terms = [("x", draw(small)), (now, draw(coefs))]
    terms += [(before, draw(small))] if i else []
    terms += draw(st.lists(st.tuples(st.sampled_from(["noise:1", "input:mask", "one"]), coefs), max_size=2))
    if draw(st.booleans()):
        ops.append(
            Transform("clamp", now, (), (("low", -1.0), ("high", draw(st.sampled_from([1.0, InputRef("top")])))))
        )
    ops.append(Affine("x", tuple(terms)))
    keeps = variant.rules[0].action == Action.COMPUTE  # under a guard it might not, and order 1 reads two values
    watched = not keeps and not some and draw(st.booleans())
    guard = Guard("cosine", "above", draw(small), Variant(), (draw(small),)) if watched else None
    alpha, sigma = math.cos(level), math.sin(level)
    outs, net = branches, ((draw(names), draw(small)),) if draw(st.booleans()) else ()
    return Step(
        draw(numbers), alpha, sigma, tuple(ops), variant, "x", draw(numbers), outs, net, (2.0, -1.0), guard, last
    )


@st.composite
def plans(draw):
    """A legal unbound plan of two to five rows."""
    count, branches = draw(st.integers(2, 5)), draw(st.sampled_from([("cond",), ("cond", "uncond")]))
    levels = sorted(draw(st.lists(st.floats(0.01, 1.5), min_size=count, max_size=count)), reverse=True)
    steps = tuple(draw(rows(i, branches, level, i == count - 1)) for i, level in enumerate(levels))
    init = (Affine("x", (("noise:0", draw(small)), *draw(st.sampled_from([(), (("input:start", 0.5),)])))),)
    prediction, recipe = draw(st.sampled_from(PREDICTIONS)), draw(st.none() | recipes)
    return Plan(steps, prediction, init, recipe, tensor_infos(ARRAYS), arrays=ARRAYS)


@st.composite
def specs(draw, prediction):
    """A model that every random plan of that prediction binds to."""
    edge, group = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, 9))
    return ModelSpec("toy", "f" * 64, prediction, SHAPE, BLOCKS, (edge, edge), token_group=group)
