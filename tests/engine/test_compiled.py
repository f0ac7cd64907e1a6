"""The compiled executor around a model's compiler, here a toy: artefacts, buckets, hoisting, receipts."""

import random
from dataclasses import replace

import pytest
import torch

import vivace
from tests.engine.test_session import v_plan
from tests.engine.toy import SHAPE, Toy
from vivace.engine.compiled import Bucket, Hoisted, bucket_of
from vivace.engine.executors import make_executor
from vivace.engine.executors.cpu import CpuExecutor
from vivace.engine.passes import apply_guidance
from vivace.engine.request import Request
from vivace.engine.session import Session


class Replay:
    """A network of the toy compiler: evaluates the toy with timesteps read from what was hoisted."""

    how = "toy"

    def __init__(self, compiler, variant):
        self.compiler, self.variant = compiler, variant

    def run(self, call):
        if call.hoisted[0] is not None:
            times = [hoisted.data[row] for hoisted, row in zip(call.hoisted, call.rows, strict=True)]
            assert times == list(call.timesteps)
        self.compiler.seen.append(call)
        return self.compiler.toy.evaluate(call.x[list(call.lanes)], call.timesteps, call.conditions, self.variant)


class ToyCompiler:
    def __init__(self, toy):
        self.toy, self.made, self.hoists, self.seen, self.refuses = toy, [], [], [], False

    precisions = frozenset({"bf16"})

    def why_not(self, variant):
        return "it refuses guidance" if self.refuses and "uncond" in variant.branches else None

    def compile(self, variant, bucket, shape):
        self.made.append((variant, bucket))
        return Replay(self, variant)

    def hoist(self, timesteps, branches, condition):
        self.hoists.append((tuple(timesteps), branches, condition))
        return Hoisted(list(timesteps), {"times": 8 * len(timesteps)})

    def report(self):
        return {"made": len(self.made)}


class Compilable(Toy):
    def __init__(self, **options):
        super().__init__(**options)
        self.spec = replace(self.spec, fingerprint=f"{options}".ljust(64, "0")[:64])
        self.made = ToyCompiler(self)

    def compiler(self):
        return self.made


def session(plan, toy=None, **options):
    toy = toy or Compilable()

    def expand(given):
        return given.bind(toy.spec, None if given.binding is None else given.binding.latent_shape)

    executor = make_executor("auto", toy, **{k: options.pop(k) for k in ("hoist",) if k in options})
    return Session(toy, [plan], executor, shape=SHAPE, expand=expand, **options)


def test_a_bucket_holds_what_falls_into_it_and_wastes_less_than_half():
    for tokens in range(1, 5000):
        for samples in (1, 2, 3, 5, 8):
            bucket = bucket_of(tokens, samples)
            assert bucket.tokens >= tokens and bucket.samples >= samples
            assert bucket.tokens <= max(16, tokens * 1.5) and bucket.samples < 2 * samples
            assert bucket_of(*bucket) == bucket
    assert bucket_of(1, 1) == Bucket(16, 1) and bucket_of(65, 3) == Bucket(96, 4)


def test_auto_takes_the_compiled_executor_and_says_why_when_it_cannot():
    assert isinstance(make_executor("auto", Compilable()), CpuExecutor)

    class Refusing(Toy):
        def compiler(self):
            raise vivace.UnsupportedError("it is a toy")

    executor = make_executor("auto", Refusing())
    assert executor.name == "eager" and "not cpu: it is a toy" in executor.reason
    with pytest.raises(vivace.BackendError, match="'cpu' cannot run here: it is a toy"):
        make_executor("cpu", Refusing())


def test_compiled_and_eager_sessions_agree_bit_for_bit_on_the_same_network():
    plan = apply_guidance(v_plan(5), 3.0, interval=(0.0, 0.6))
    eager = Session(Toy(), [plan], make_executor("eager", Toy()), shape=SHAPE, expand=lambda p: p.bind(Toy().spec))
    for hoist in (True, False):
        got = session(plan, hoist=hoist)("abc", n=3, seed=4).latents
        assert torch.equal(got, eager("abc", n=3, seed=4).latents)


def test_changing_numbers_compiles_nothing():
    s = session(apply_guidance(v_plan(4), 2.0))
    before = s("a", seed=1).receipt.compiles
    s("abcdef", seed=2)
    s("a", guidance_scale=5.0)
    s("a", plan=apply_guidance(v_plan(9), 3.0))
    after = s("a", plan=apply_guidance(v_plan(6, solver="dpmpp_2m"), 3.0)).receipt
    assert before == after.compiles == s.executor.compiles > 0


def test_a_hundred_resolutions_compile_at_most_as_many_artefacts_as_there_are_buckets():
    toy, plan = Compilable(), apply_guidance(v_plan(2), 2.0)
    s = session(plan, toy, probed=False)
    draw = random.Random(0)
    shapes = [(3, 4 * draw.randint(1, 12), 4 * draw.randint(1, 12)) for _ in range(100)]
    states = []
    for i, shape in enumerate(shapes):
        states.append(s.begin(Request("a", plan.bind(toy.spec, shape), n=1 + i % 2, seed=i)))
    while not states[0].done:
        s.step(states)
    results = [s.finish(state) for state in states]
    assert [result.latents.shape for result in results] == [(1 + i % 2, *shape) for i, shape in enumerate(shapes)]
    sizes = {shape: sum(1 + i % 2 for i, other in enumerate(shapes) if other == shape) for shape in shapes}
    buckets = {bucket_of(toy.spec.tokens(shape), n) for shape, n in sizes.items()} | {bucket_of(4, 1)}
    buckets |= {bucket_of(toy.spec.tokens(shape), 1) for shape in shapes}
    assert len(toy.made.made) <= len(buckets)
    assert results[-1].receipt.compiles == len(toy.made.made)


def test_a_picture_of_another_resolution_has_the_bits_of_its_own_session():
    toy, plan = Compilable(), v_plan(3)
    shape = (3, 12, 20)
    s = session(plan, toy)
    own = Session(toy, [plan], make_executor("cpu", toy), shape=shape, expand=lambda p: p.bind(toy.spec, shape))
    bound = plan.bind(toy.spec, shape)
    state, other = s.begin(Request("a", bound, seed=5)), s.begin(Request("a", seed=5))
    while not state.done:
        s.step([state, other])
    assert torch.equal(s.finish(state).latents, own("a", seed=5).latents)
    assert torch.equal(s.finish(other).latents, session(plan)("a", seed=5).latents)


def test_slot_memory_of_resolutions_long_unused_is_freed():
    toy, plan = Compilable(), v_plan(2)
    s = session(plan, toy, probed=False)
    held = s.begin(Request("a", plan.bind(toy.spec, (3, 4, 4))))
    for k in range(2, 2 + 2 * s.kept_pools):
        s("a", plan=plan.bind(toy.spec, (3, 4 * k, 4)))
    assert len(s._pools) <= s.kept_pools + 1 and SHAPE in s._pools and (3, 4, 4) in s._pools
    while not held.done:
        s.step([held])
    s.finish(held)


def test_what_left_the_loop_is_computed_once_a_request_kept_for_the_next_and_on_the_receipt():
    toy = Compilable()
    s = session(apply_guidance(v_plan(4), 2.0), toy)
    before = len(toy.made.hoists)
    receipt = s("ab", n=2, seed=1).receipt
    assert len(toy.made.hoists) == before + 1 and len(toy.made.hoists[-1][0]) == 4
    assert receipt.hoisted == {"times": 32} and "hoisted" in str(receipt) and receipt.to_dict()["hoisted"]
    s("ab", seed=2)
    assert len(toy.made.hoists) == before + 1
    s("abc", seed=2)
    assert len(toy.made.hoists) == before + 2
    assert session(v_plan(2), hoist=False)("a").receipt.hoisted == {}


def test_a_variant_that_the_compiler_refuses_is_named_before_any_work():
    toy = Compilable()
    s = session(v_plan(2), toy)
    toy.made.refuses = True
    compiles, plan = s.executor.compiles, apply_guidance(v_plan(4), 2.0, interval=(0.5, 1.0))
    with pytest.raises(vivace.UnsupportedError, match="step 2: the cpu executor cannot run it: it refuses"):
        s("a", plan=plan)
    assert s.executor.compiles == compiles and s.pool.idle


def test_samples_of_a_coupled_network_run_one_by_one_in_the_compiled_executor_too():
    toy = Compilable(coupled=True)
    s = session(v_plan(3), toy)
    result = s("a", n=3, seed=2)
    assert "differ" in result.receipt.one_by_one
    for j in range(3):
        assert torch.equal(result.latents[j : j + 1], s("a", index=j, seed=2).latents)


def test_a_set_of_branches_met_later_is_tested_as_if_it_were_the_first():
    guided = session(apply_guidance(v_plan(2), 2.0), Compilable(coupled=True))
    guided("a", plan=v_plan(2))
    assert session(v_plan(2), Compilable(coupled=True)).probe.one_by_one is not None  # as kept by the one before


def test_the_self_test_of_a_compiled_model_is_kept_for_the_next_session():
    plan = apply_guidance(v_plan(2), 2.0)
    first, second = (Compilable() for _ in range(2))
    before = session(plan, first).probe.ms
    assert session(plan, second).probe.ms == before and not second.calls
    assert session(plan, Compilable(coupled=True)).probe.one_by_one is not None
    again = Compilable(coupled=True)
    assert session(plan, again).probe.one_by_one is not None and not again.calls
