"""Token rows in a pipeline's own loop and in sessions: the same pictures, whichever way branches are batched."""

import gc

import pytest
import torch
from tests.models.pipelines import test_cached_calls as cached
from tests.models.pipelines.test_cached_calls import plan_of
from tests.models.pipelines.test_denoiser import load, noise_of, prompt_of
from tests.models.pipelines.tiny import FAMILIES, make

import vivace
from vivace.engine.passes import apply_block_cache, apply_tokens
from vivace.errors import UnsupportedError
from vivace.models.tokens.called import CallTokens

WHOLE = ("sd15", "sdxl", "sana")
SOME = [name for name in FAMILIES if name not in WHOLE]
GUIDED = [name for name in SOME if FAMILIES[name].guided]
STEPS = 6


def sparse(plan, keep=0.5, **options):
    return apply_tokens(plan, keep, **({"first": 2, "last": 1} | options))


def picture(name, pipe, **changes):
    return cached.picture(name, pipe, **({"num_inference_steps": STEPS} | changes))


def last_latents(name, pipe, noise):
    last = []
    call = FAMILIES[name].arguments(output_type="latent", latents=noise.clone(), num_inference_steps=STEPS)
    pipe(**call, callback_on_step_end=lambda p, i, t, tensors: last.append(tensors["latents"]) or {})
    return last[-1][:1]


def guided_by(plan, name):
    return vivace.passes.apply_guidance(plan, scale=float(FAMILIES[name].call[FAMILIES[name].scale]))


def near(found, wanted, within=1e-4):
    return float((found - wanted).norm() / wanted.norm()) < within


@pytest.mark.parametrize("name", SOME)
def test_token_rows_run_in_the_loop_of_every_family(name):
    pipe = make(name)
    plan = plan_of(name, pipe, STEPS, guided=name == "wan22")
    if name == "wan22":  # the first row of the second network computes all
        plan = vivace.passes.apply_experts(plan, below=0.75 * pipe.scheduler.config.num_train_timesteps)
    own = picture(name, pipe)
    vivace.accelerate(pipe, sparse(plan, 1.0))  # all tokens: no pass at all
    plain = picture(name, pipe)
    vivace.restore(pipe)
    assert torch.equal(plain, own) or pipe.scheduler.config.get("use_dynamic_shifting")
    vivace.accelerate(pipe, sparse(plan))
    first, told = picture(name, pipe), vivace.receipt(pipe)
    half = told.tokens["of"] // 2
    chosen = [row.tokens for row in told.rows]
    assert set(chosen) == {None, half} and told.tokens["rows"] == chosen.count(half) > 0
    assert 0.5 < told.tokens["share"] < 1.0 and not told.warnings
    assert torch.equal(picture(name, pipe), first)  # nothing is left of the first call
    assert 0.0 < float((first - plain).norm()) < float(plain.norm())
    vivace.restore(pipe)
    assert torch.equal(picture(name, pipe), own)


AGREEING = ["sd3", "flux", "lumina2", "cogvideox", "wan", "ltx", "hunyuan_video", "flux_true_cfg"]
CHOICES = [(name, "deviation") for name in AGREEING]
CHOICES += [(name, selector) for name in ("sd3", "flux", "wan") for selector in ("norm", "change", "attention")]


@pytest.mark.parametrize(("name", "selector"), CHOICES)
def test_a_session_and_the_pipeline_agree(name, selector):
    loaded, pipe = load(name), make(name)
    noise = noise_of(loaded.spec.latent_shape)
    plan = loaded.plan(STEPS)
    plan = guided_by(plan, name) if FAMILIES[name].guided else plan
    plan = sparse(plan, selector=selector)
    wanted = loaded.compile(plan, backend="eager")(prompt_of(name), latents=noise)
    compiled = loaded.compile(plan)(prompt_of(name), latents=noise)
    assert near(compiled.latents, wanted.latents)
    assert torch.equal(compiled.computed, wanted.computed)
    vivace.accelerate(pipe, plan)
    assert near(last_latents(name, pipe, noise), wanted.latents)
    assert vivace.receipt(pipe).tokens["share"] == pytest.approx(wanted.receipt.tokens["share"])


@pytest.mark.parametrize("name", [name for name in GUIDED if name not in ("qwen", "lumina2", "wan22")])
def test_guidance_by_the_plan_and_by_the_pipeline_keep_the_same_tokens(name):
    pipe, pictures = make(name), []
    for guided in (False, True):
        vivace.accelerate(pipe, sparse(plan_of(name, pipe, STEPS, guided=guided)))
        pictures.append(picture(name, pipe))
        vivace.restore(pipe)
    assert near(*pictures, 1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux_true_cfg", "wan"])
@pytest.mark.parametrize("guided", [False, True])
def test_two_prompts_in_one_call_are_the_pictures_of_single_calls(name, guided):
    pipe = make(name)
    vivace.accelerate(pipe, sparse(plan_of(name, pipe, STEPS, guided=guided)))
    calls = []
    for seed in range(2):
        call = FAMILIES[name].arguments(num_inference_steps=STEPS)
        calls.append({key: v + 0.1 * seed if isinstance(v, torch.Tensor) else v for key, v in call.items()})
    both = {
        key: torch.cat([call[key] for call in calls]) if isinstance(v, torch.Tensor) else v
        for key, v in calls[0].items()
    }
    together = torch.as_tensor(pipe(**both, generator=[torch.Generator().manual_seed(seed) for seed in range(2)])[0])
    for seed, call in enumerate(calls):
        alone = torch.as_tensor(pipe(**call, generator=[torch.Generator().manual_seed(seed)])[0])
        assert near(together[seed : seed + 1], alone, 1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux", "lumina2", "wan"])
def test_two_pictures_of_a_session_are_two_runs(name):
    loaded = load(name)
    session = loaded.compile(sparse(loaded.plan(STEPS)), backend="eager")
    both = session(prompt_of(name), n=2, seed=3)
    for index in range(2):
        alone = session(prompt_of(name), n=1, seed=3, index=index)
        assert near(both.latents[index : index + 1], alone.latents, 1e-5)
        assert torch.equal(both.computed[index : index + 1], alone.computed)
    assert torch.equal(session(prompt_of(name), n=2, seed=3).latents, both.latents)


@pytest.mark.parametrize("name", ["sd3", "flux", "lumina2", "qwen", "wan"])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_requests_in_one_row_have_tokens_of_their_own(name, backend):
    loaded = load(name)
    plan = sparse(guided_by(loaded.plan(STEPS), name) if FAMILIES[name].guided else loaded.plan(STEPS))
    session = loaded.compile(plan, backend=backend)
    other = {key: 1.1 * v if torch.is_tensor(v) and v.is_floating_point() else v for key, v in prompt_of(name).items()}
    requests = [vivace.Request(prompt, seed=seed) for seed, prompt in enumerate((prompt_of(name), other))]
    states = [session.begin(request) for request in requests]
    while not states[0].done:
        session.step(states)
    for state, request in zip(states, requests, strict=True):
        together = session.finish(state)
        alone = session(request.prompt, seed=request.seed)
        assert near(together.latents, alone.latents, 1e-5)
        assert torch.equal(together.computed, alone.computed)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_caches_in_token_rows(name):
    loaded = load(name)
    plan = loaded.plan(STEPS)
    plan = guided_by(plan, name) if FAMILIES[name].guided else plan
    plan = sparse(apply_block_cache(plan, "fora", interval=2))
    noise = noise_of(loaded.spec.latent_shape)
    wanted = loaded.compile(plan, backend="eager")(prompt_of(name), latents=noise)
    assert wanted.receipt.caches["reused"] > 0 and wanted.receipt.tokens["rows"] > 0
    pipe = make(name)
    vivace.accelerate(pipe, plan)
    assert near(last_latents(name, pipe, noise), wanted.latents)


@pytest.mark.parametrize("name", ["dit", "sd3", "wan", "ltx", "cogvideox"])
def test_multistep_solvers_know_how_old_tokens_are(name):
    loaded = load(name)
    plan = vivace.make_plan(loaded.spec.schedule, solver="dpmpp_2m", steps=STEPS, prediction=loaded.spec.prediction)
    noise = noise_of(loaded.spec.latent_shape)
    plain = loaded.compile(plan, backend="eager")(prompt_of(name), latents=noise).latents
    found = loaded.compile(sparse(plan), backend="eager")(prompt_of(name), latents=noise)
    assert 0.0 < float((found.latents - plain).norm()) < float(plain.norm())


def test_a_guidance_that_ends_keeps_tokens_of_the_branch_that_goes_on():
    pipe = make("sd3")
    plan = vivace.passes.apply_guidance(plan_of("sd3", pipe, STEPS), scale=5.0, interval=(0.0, 0.5))
    vivace.accelerate(pipe, sparse(plan))
    first = picture("sd3", pipe)
    assert torch.equal(picture("sd3", pipe), first)
    assert {row.tokens for row in vivace.receipt(pipe).rows} == {None, 8}


def test_a_run_that_starts_anew_computes_all_tokens_first():
    pipe = make("sd3")
    vivace.accelerate(pipe, sparse(plan_of("sd3", pipe, STEPS), first=1))

    def change(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.9} if step == 2 else {}

    picture("sd3", pipe, callback_on_step_end=change)
    told = vivace.receipt(pipe)
    assert told.details["restarts"] == 1
    assert [row.tokens for row in told.rows] == [None, 8, 8, None, 8, None]


def test_calls_of_fewer_steps_and_other_sizes_plan_their_tokens_anew():
    pipe = make("flux")
    vivace.accelerate(pipe, sparse(plan_of("flux", pipe, 8)))
    picture("flux", pipe, num_inference_steps=5)
    assert vivace.receipt(pipe).nfe == 5
    picture("flux", pipe, height=16, width=32)
    told = vivace.receipt(pipe)
    assert told.tokens["of"] == 32 and {row.tokens for row in told.rows} == {None, 16}


def test_what_a_pipeline_cannot_run_is_refused_when_accelerating():
    pipe = make("sd15")
    with pytest.raises(UnsupportedError, match="UNet2DConditionModel computes all image tokens in every row"):
        vivace.accelerate(pipe, sparse(plan_of("sd15", pipe, STEPS)))
    pipe = make("sd3")
    with pytest.raises(UnsupportedError, match="selector 'mask': a pipeline's call gives a plan no mask"):
        vivace.accelerate(pipe, sparse(plan_of("sd3", pipe, STEPS), selector="mask"))


def test_skipped_layers_are_a_branch_that_plans_do_not_know():
    pipe = make("sd3")
    vivace.accelerate(pipe, sparse(plan_of("sd3", pipe, STEPS)))
    with pytest.raises(UnsupportedError, match="skip_layers: a further branch"):
        picture("sd3", pipe, skip_guidance_layers=[1])


def test_nothing_of_a_call_outlives_it():
    pipe = make("sd3")
    vivace.accelerate(pipe, sparse(plan_of("sd3", pipe, STEPS)))
    picture("sd3", pipe)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is CallTokens]
