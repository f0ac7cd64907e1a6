"""`vivace.accelerate` on every family: the same bits with the scheduler's own plan, everything back after `restore`."""

import pickle

import pytest
import torch
from tests.models.pipelines import tiny

import vivace
from vivace.models.pipelines.calls import require_style

ALL = {**tiny.FAMILIES, **tiny.VARIANTS}
SHIFTED = {"flux", "flux_true_cfg", "flux2", "qwen", "lumina2", "ltx", "flux_img2img", "flux_inpaint"}  # mu comes late
NOT_PLAIN = {"lumina2", "qwen"}  # guidance of their pipelines rescales


@pytest.fixture(scope="module")
def pipes():
    made = {}
    return lambda name: made.setdefault(name, tiny.make(name))


def run(pipe, name, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(pipe(**ALL[name].arguments(**changes), generator=generator)[0])


def accelerated(pipe, name, plan=None, **options):
    """(picture, receipt) of one call under a plan; the pipeline is restored."""
    changes = {key: options.pop(key) for key in list(options) if key not in ("arithmetic", "kernels")}
    vivace.accelerate(pipe, plan, **options)
    try:
        return run(pipe, name, **changes), vivace.receipt(pipe)
    finally:
        vivace.restore(pipe)


def far(picture, other):
    return float((picture - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", ALL)
def test_what_the_scheduler_does_keeps_every_bit(pipes, name):
    pipe = pipes(name)
    plain = run(pipe, name)
    picture, receipt = accelerated(pipe, name)
    assert torch.equal(picture, plain)
    assert receipt.nfe == receipt.nfe_planned and receipt.branch_evals == receipt.branch_evals_planned
    assert receipt.kernels[0].backend == "diffusers"


@pytest.mark.parametrize("name", [name for name in ALL if name not in SHIFTED])
def test_the_plan_of_its_scheduler_keeps_every_bit(pipes, name):
    pipe = pipes(name)
    plan = vivace.Plan.from_diffusers(pipe.scheduler, steps=tiny.STEPS)
    picture, _ = accelerated(pipe, name, plan)
    assert torch.equal(picture, run(pipe, name))


@pytest.mark.parametrize("name", [name for name in ALL if name not in SHIFTED and ALL[name].guided])
def test_guidance_in_the_plan_keeps_every_bit_where_the_pipeline_combines_plainly(pipes, name):
    pipe = pipes(name)
    scale = require_style(pipe).scale
    plan = vivace.passes.apply_guidance(vivace.Plan.from_diffusers(pipe.scheduler, steps=tiny.STEPS), 3.0)
    second = {"guidance_scale_2": None} if name == "wan22" else {}
    picture, receipt = accelerated(pipe, name, plan, **{scale: 3.0}, **second)
    assert torch.equal(picture, run(pipe, name, **{scale: 3.0}, **second))
    assert receipt.kernels[0].backend == "diffusers"


@pytest.mark.parametrize("name", ALL)
def test_the_fused_step_agrees_with_the_scheduler(pipes, name):
    pipe = pipes(name)
    picture, receipt = accelerated(pipe, name, arithmetic="plan")
    assert far(picture, run(pipe, name)) < 2e-5
    assert receipt.kernels[0].backend == "plan" and receipt.nfe == receipt.nfe_planned


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].guided and name not in NOT_PLAIN])
def test_raw_branches_through_the_plan_give_the_pipelines_guidance(pipes, name):
    pipe = pipes(name)
    plain = run(pipe, name)
    vivace.accelerate(pipe)
    run(pipe, name)
    own = pipe.__dict__["_vivace_acceleration"].planner
    (effective,) = own._made.values()
    vivace.restore(pipe)
    plan = vivace.passes.apply_guidance(effective.plan, 1.0)
    picture, receipt = accelerated(pipe, name, plan, arithmetic="plan")
    assert receipt.kernels[0].backend == "plan"
    assert far(picture, plain) < 1e-4


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].guided])
def test_rows_outside_the_interval_evaluate_one_branch(pipes, name):
    pipe = pipes(name)
    calls = []
    for part in ALL[name].denoisers:
        getattr(pipe, part).register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(
                next(v for v in (*args, *kwargs.values()) if v.dim() > 1).shape[0]
            ),
            with_kwargs=True,
        )
    vivace.accelerate(pipe)
    run(pipe, name)
    (effective,) = pipe.__dict__["_vivace_acceleration"].planner._made.values()
    vivace.restore(pipe)
    whole = sum(calls)
    calls.clear()
    plan = vivace.passes.apply_guidance(effective.plan, 3.0, interval=(0.0, 0.75))
    _, receipt = accelerated(pipe, name, plan)
    guided = sum(row.branches == ("cond", "uncond") for row in receipt.rows)
    assert 0 < guided < receipt.nfe and sum(calls) == receipt.branch_evals == receipt.nfe + guided < whole
    for part in ALL[name].denoisers:
        getattr(pipe, part)._forward_pre_hooks.clear()
        getattr(pipe, part)._forward_pre_hooks_with_kwargs.clear()


@pytest.mark.parametrize("name", ALL)
def test_restore_leaves_the_object_as_it_was(name):
    pipe = tiny.make(name)
    run(pipe, name)
    kind, state, scheduler = type(pipe), dict(pipe.__dict__), pickle.dumps(pipe.scheduler.__dict__)
    modules = {key: part for key, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    weights = {key: [(p.data_ptr(), p._version) for p in part.parameters()] for key, part in modules.items()}
    inside = {key: {n: dict(m.__dict__) for n, m in part.named_modules()} for key, part in modules.items()}
    for arithmetic in ("auto", "plan"):
        accelerated(pipe, name, arithmetic=arithmetic)
    assert type(pipe) is kind and pipe.__dict__.keys() == state.keys()
    assert all(pipe.__dict__[key] is part for key, part in modules.items())
    assert pickle.dumps(pipe.scheduler.__dict__) == scheduler
    assert weights == {key: [(p.data_ptr(), p._version) for p in part.parameters()] for key, part in modules.items()}
    assert {key: {n: dict(m.__dict__) for n, m in part.named_modules()} for key, part in modules.items()} == inside
