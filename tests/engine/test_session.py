import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import vivace
from tests.engine.plans import edit, euler
from tests.engine.toy import SHAPE, Toy, session
from vivace.engine.noise import normals
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Action, Affine, Guard, InputRef, Rule, Variant
from vivace.engine.request import Request
from vivace.errors import ArgumentError, DtypeError, PromptError, ShapeError, StateError, UnsupportedError


def v_plan(steps=4, **options):
    schedule = vivace.NoiseSchedule.vp(np.linspace(1e-4, 2e-2, 1000))
    return vivace.make_plan(schedule, steps=steps, prediction="v", **options)


def run(s, requests):
    """All requests together, each finished as soon as it is done."""
    states = [s.begin(request) for request in requests]
    results = [None] * len(states)
    while any(state is not None for state in states):
        s.step([state for state in states if state is not None])
        for i, state in enumerate(states):
            if state is not None and state.done:
                results[i], states[i] = s.finish(state), None
    return results


def mixed():
    """Eight requests with eight plans, step counts, guidance scales, prompts and seeds."""
    solvers = ["unipc", "ddim", "dpmpp_2m", "unipc", "ddim", "unipc", "dpmpp_2m", "ddim"]
    options = [
        {},
        {"eta": 0.7},
        {},
        {"order": 3, "variant": "bh1"},
        {},
        {"order": 1},
        {"variant": "heun"},
        {"eta": 1.0},
    ]
    requests = []
    for i, (solver, extra) in enumerate(zip(solvers, options, strict=True)):
        plan = v_plan(3 + i, solver=solver, **extra)
        if i % 4:
            plan = apply_guidance(plan, 2.0, interval=(0.0, 1.0 if i % 2 else 0.6))
        scale = 1.5 + 0.5 * i if i % 4 else None
        requests.append(Request("p" * i or None, plan, n=1 + i % 3, index=i, seed=100 + i, guidance_scale=scale))
    return requests


def test_a_mixed_batch_gives_every_sample_the_bits_of_its_solo_run():
    requests = mixed()
    together = run(session(requests[0].plan), requests)
    for request, result in zip(requests, together, strict=True):
        alone = run(session(requests[0].plan), [request])[0]
        assert torch.equal(result.latents, alone.latents)
        for j in range(request.n):
            one = replace(request, n=1, index=request.index + j)
            assert torch.equal(run(session(requests[0].plan), [one])[0].latents[0], result.latents[j])


def test_order_of_arrival_does_not_change_bits():
    s, requests = session(v_plan()), mixed()
    reference = [run(s, [request])[0].latents for request in requests]
    waiting, running, done = list(enumerate(requests)), [], {}
    while waiting or running:
        if waiting:
            i, request = waiting.pop()
            running.append((i, s.begin(request)))
        s.step([state for _, state in reversed(running)])
        for i, state in [pair for pair in running if pair[1].done]:
            done[i] = s.finish(state).latents
        running = [pair for pair in running if not pair[1].done]
    assert all(torch.equal(done[i], latents) for i, latents in enumerate(reference))


def test_one_launch_per_structure():
    toy = Toy()
    s = session(v_plan(), toy=toy)
    guided = apply_guidance(v_plan(), 3.0)
    states = [s.begin(Request(plan=plan)) for plan in (v_plan(), guided, v_plan(5), guided)]
    toy.calls.clear()
    s.step(states)
    assert sorted(toy.calls) == [(2, ("cond",)), (2, ("cond", "uncond"))]


def test_session_equals_sample():
    plan, toy = apply_guidance(v_plan(6), 3.0), Toy()
    noise = torch.from_numpy(np.stack([normals(SHAPE, 5, picture=j) for j in (2, 3)]))

    def call(x, t, branch):
        outs = toy.evaluate(x, t.tolist(), [4.0] * len(x), Variant(branches=("cond", "uncond")))
        return outs[0 if branch == "cond" else 1]

    got = session(plan)("abcd", n=2, index=2, seed=5).latents
    assert torch.equal(got, vivace.sample(call, plan, noise, seed=5))


def test_latents_stand_for_draw_zero():
    s = session(v_plan())
    drawn = torch.from_numpy(np.stack([normals(SHAPE, 9, picture=j) for j in range(2)]))
    assert torch.equal(s("a", n=2, seed=9).latents, s("a", n=2, latents=drawn).latents)


def test_finished_and_aborted_states_free_their_lanes():
    s = session(v_plan())
    for _ in range(5):
        state = s.begin(Request(n=3))
        s.step([state])
        s.abort(state)
        s.abort(state)
        s(n=2)
    assert s.pool.state.shape[1] == 3
    with pytest.raises(StateError, match="aborted"):
        s.step([state])
    with pytest.raises(StateError, match="aborted"):
        s.finish(state)


def test_neighbours_survive_growth_and_aborts():
    s = session(v_plan(), batch=1)
    want = s("long prompt", seed=3).latents
    state = s.begin(Request("long prompt", seed=3))
    s.step([state])
    others = [s.begin(Request("x", n=4, plan=v_plan(9, order=3))) for _ in range(3)]
    s.step([state, *others])
    s.abort(others[1])
    while not state.done:
        s.step([state])
    assert torch.equal(s.finish(state).latents, want)


def test_states_are_used_rightly():
    s = session(v_plan())
    state = s.begin(Request())
    with pytest.raises(StateError, match="another session"):
        session(v_plan()).step([state])
    with pytest.raises(StateError, match="twice"):
        s.step([state, state])
    with pytest.raises(StateError, match="row 0 of 4"):
        s.finish(state)
    for _ in range(4):
        (report,) = s.step([state])
    assert report.done and report.row == 3 and report.rows == 4
    with pytest.raises(StateError, match="no rows left"):
        s.step([state])
    s.finish(state)


@pytest.mark.parametrize(
    ("bad", "error", "fragment"),
    [
        ({"n": 0}, ArgumentError, "n is 0"),
        ({"n": True}, ArgumentError, "n is True"),
        ({"seed": -1}, ArgumentError, "seed"),
        ({"seed": 1 << 64}, ArgumentError, "seed"),
        ({"index": -1}, ArgumentError, "index"),
        ({"prompt": "nonsense"}, PromptError, "nonsense"),
        ({"latents": torch.zeros(1, 3, 8, 9)}, ShapeError, "latents"),
        ({"latents": torch.zeros(2, *SHAPE)}, ShapeError, "latents"),
        ({"latents": torch.zeros(1, *SHAPE, dtype=torch.int32)}, DtypeError, "int32"),
        ({"latents": torch.full((1, *SHAPE), float("nan"))}, ArgumentError, "NaN"),
        ({"guidance_scale": float("inf"), "plan": apply_guidance(euler(), 2.0)}, ArgumentError, "guidance_scale"),
        ({"mask": torch.ones(8, 8)}, ArgumentError, "mask"),
        ({"inputs": {"strength": 1.0}}, ArgumentError, "strength"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_taken(bad, error, fragment):
    s = session(euler(), toy=Toy("flow"))
    with pytest.raises(error, match=fragment):
        s.begin(Request(**bad))
    assert s.pool.state.shape[1] == 0


def test_an_option_without_effect_is_a_warning_in_the_receipt():
    receipt = session(v_plan())(guidance_scale=3.0).receipt
    assert "guidance_scale had no effect" in receipt.warnings[0]
    assert not session(apply_guidance(v_plan(), 2.0))(guidance_scale=3.0).receipt.warnings


def test_request_inputs_reach_the_plan():
    blend = (Affine("k", (("x", 1.0), ("input:start", -1.0))), Affine("x", (("x", 1.0), ("k", InputRef("mask")))))
    plan = edit(euler(), 1, ops=(*euler().steps[1].ops, *blend))
    s = session(plan, toy=Toy("flow"))
    start, mask = torch.rand(SHAPE), torch.rand(8, 8)
    a = s(n=2, image=start, mask=mask).latents
    assert torch.equal(a, s(n=2, image=start, mask=mask).latents)
    assert not torch.equal(a, s(n=2, image=start, mask=1 - mask).latents)
    with pytest.raises(ArgumentError, match="needs input"):
        s(mask=mask)


def test_receipt_says_what_ran():
    plan = apply_guidance(v_plan(5), 2.0, interval=(0.0, 0.6))
    receipt = session(plan)("abc", n=2).receipt
    data = receipt.to_dict()
    assert (receipt.nfe, receipt.branch_evals) == (receipt.nfe_planned, receipt.branch_evals_planned) == (5, 8)
    assert [row.branches for row in receipt.rows] == [("cond", "uncond")] * 3 + [("cond",)] * 2
    assert receipt.plan_hash == plan.bind(Toy().spec).hash
    assert {"network", "solver_step", "start", "decode"} <= set(data["phases"])
    assert receipt.predicted_ms > 0 and receipt.peak_memory > 0 and receipt.pool > 0
    kernel = data["kernels"][0]
    assert kernel["op"] == "solver_step" and kernel["reason"]
    assert "evaluations" in str(receipt)


def test_a_model_whose_samples_meet_runs_one_by_one_and_says_so():
    s = session(v_plan(), toy=Toy(coupled=True))
    assert "differ" in s.probe.one_by_one
    both = s(n=2, seed=4)
    assert "differ" in both.receipt.to_dict()["one_by_one"]
    assert torch.equal(both.latents[1], s(index=1, seed=4).latents[0])
    assert session(v_plan()).probe.one_by_one is None


def test_a_failing_network_leaves_its_states_as_they_were():
    toy = Toy()
    s = session(v_plan(), toy=toy)
    want = s("pizza", seed=8).latents
    state = s.begin(Request("pizza", seed=8))
    s.step([state])
    evaluate, toy.evaluate = toy.evaluate, lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        s.step([state])
    assert state.row == 1
    toy.evaluate = evaluate
    while not state.done:
        s.step([state])
    assert torch.equal(s.finish(state).latents, want)


def test_a_failing_decoder_frees_the_lanes():
    toy = Toy()
    s = session(v_plan(), toy=toy)
    toy.to_images = lambda latents: 1 / 0
    with pytest.raises(ZeroDivisionError):
        s("pizza")
    assert s.pool.idle


def test_callback_sees_every_row_and_may_stop():
    s, seen = session(v_plan()), []
    s(callback=lambda report: seen.append((report.row, report.done)))
    assert seen == [(0, False), (1, False), (2, False), (3, True)]
    with pytest.raises(StateError, match="stopped"):
        s(callback=lambda report: report.row < 1)
    assert len(s.pool._free) == s.pool.state.shape[1]


def test_sixteen_threads_share_a_session():
    s, requests = session(v_plan()), mixed() * 2
    want = [run(s, [request])[0].latents for request in requests]
    got = [None] * len(requests)

    def work(i):
        got[i] = run(s, [requests[i]])[0].latents

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize(
    ("variant", "guard", "fragment"),
    [
        (Variant(rules=(Rule((0, 2), precision="int8"),)), None, "precision"),
        (Variant(model="second"), None, "second model"),
        (Variant(), Guard("cosine", "above", 0.9, Variant()), "guard"),
    ],
)
def test_what_the_eager_executor_lacks_is_refused_at_compile_time(variant, guard, fragment):
    with pytest.raises(UnsupportedError, match=f"step 1.*{fragment}"):
        session(edit(euler(), 1, variant=variant, guard=guard), toy=Toy("flow"))


def test_block_reuse_is_refused_at_compile_time():
    plan = edit(euler(), 0, variant=Variant(rules=(Rule((0, 2), action=Action.COMPUTE),)))
    plan = edit(plan, 1, variant=Variant(rules=(Rule((0, 2), action=Action.REUSE),)))
    with pytest.raises(UnsupportedError, match="step 1.*REUSE"):
        session(plan, toy=Toy("flow"))


def test_the_plan_of_the_session_is_run_after_many_others():
    s = session(v_plan())
    s.kept_plans, want = 2, s("pizza").latents
    for steps in range(5, 9):
        s(plan=v_plan(steps))
    assert torch.equal(s("pizza").latents, want) and len(s._bound) == 2


def test_many_plans_do_not_pile_up():
    s = session(v_plan())
    for i in range(s.pool.kept_entries + 20):
        s(plan=apply_guidance(v_plan(2), 2.0), guidance_scale=1.0 + i)
    assert len(s.pool._entries) <= s.pool.kept_entries + 1
