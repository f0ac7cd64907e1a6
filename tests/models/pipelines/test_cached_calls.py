"""Caches in a pipeline's own loop: by branch whichever way it batches, gone with the call, said on its receipt."""

import gc
import threading
from dataclasses import replace

import diffusers
import pytest
import torch
from tests.models.pipelines.checks import networks
from tests.models.pipelines.test_denoiser import load, noise_of, prompt_of
from tests.models.pipelines.tiny import FAMILIES, VARIANTS, embeddings, make

import vivace
from vivace.engine.passes import apply_block_cache, apply_experts, apply_guards, apply_guidance
from vivace.engine.plan import Action, Rule
from vivace.errors import PlanError, StateError, UnsupportedError
from vivace.models.pipelines.cached import CallCaches, cached_rows

UNETS = ("sd15", "sdxl")
GUIDED = [name for name in FAMILIES if FAMILIES[name].guided]


def plan_of(name, pipe, steps=4, guided=False):
    """What the pipeline's scheduler does, with the call's guidance in the plan or left to the pipeline."""
    family, config = FAMILIES[name], pipe.scheduler.config
    mu = {"mu": 0.7} if config.get("use_dynamic_shifting") else {}
    plan = vivace.Plan.from_diffusers(pipe.scheduler, steps, **mu)
    return apply_guidance(plan, scale=float(family.call[family.scale])) if guided else plan


def cached(name, plan, interval=2, **options):
    return apply_block_cache(plan, "deep_cache" if name in UNETS else "fora", interval=interval, **options)


def picture(name, pipe, **changes):
    call = {**FAMILIES, **VARIANTS}[name].arguments(**changes)
    return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(0))[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cached_plan_runs_in_the_loop_of_every_family(name):
    pipe = make(name)
    own, plan = picture(name, pipe), plan_of(name, pipe)
    vivace.accelerate(pipe, plan)
    plain = picture(name, pipe)
    assert torch.equal(plain, own) or pipe.scheduler.config.get("use_dynamic_shifting")  # planned for another shift
    vivace.restore(pipe)
    vivace.accelerate(pipe, cached(name, plan, 1))
    assert torch.equal(picture(name, pipe), plain)
    assert any("caching had no effect" in warning for warning in vivace.receipt(pipe).warnings)
    vivace.restore(pipe)
    vivace.accelerate(pipe, cached(name, plan))
    first = picture(name, pipe)
    told = vivace.receipt(pipe)
    assert told.caches["reused"] > 0 and told.caches["bytes"] > 0 and not told.warnings
    assert [row.reused > 0 for row in told.rows] == [
        step.variant.rules != () and reads(step) for step in evaluated(pipe)
    ]
    assert 0.0 < told.caches["computed_share"] < 1.0
    assert torch.equal(picture(name, pipe), first)  # nothing is left of the first call
    assert 0.0 < float((first - plain).norm()) < float(plain.norm())
    vivace.restore(pipe)
    assert torch.equal(picture(name, pipe), own)


def evaluated(pipe):
    plan = cached_rows(pipe.__dict__["_vivace_acceleration"].planner.plan, 5 if hasattr(pipe, "unet") else 6)
    return plan.steps


def reads(step):
    return any(rule.action in (Action.REUSE, Action.FORECAST) for rule in step.variant.rules)


@pytest.mark.parametrize("name", [name for name in GUIDED if name not in ("qwen", "lumina2", "wan22")])
def test_guidance_by_the_plan_and_by_the_pipeline_keep_the_same(name):
    pipe = make(name)
    pictures = []
    for guided in (False, True):
        vivace.accelerate(pipe, cached(name, plan_of(name, pipe, guided=guided)))
        pictures.append((picture(name, pipe), vivace.receipt(pipe).caches))
        vivace.restore(pipe)
    (silent, one), (planned, two) = pictures
    assert float((silent - planned).norm() / silent.norm()) < 1e-5
    assert one == two


@pytest.mark.parametrize("name", ["sd3", "flux", "sdxl", "sana", "cogvideox", "wan", "ltx"])
def test_a_session_and_the_pipeline_agree(name):
    loaded, pipe, last = load(name), make(name), []
    noise = noise_of(loaded.spec.latent_shape)
    plan = loaded.plan(4)
    if FAMILIES[name].guided:
        plan = apply_guidance(plan, scale=float(FAMILIES[name].call[FAMILIES[name].scale]))
    plan = cached(name, plan)
    wanted = loaded.compile(plan)(prompt_of(name), latents=noise).latents
    vivace.accelerate(pipe, plan)
    call = FAMILIES[name].arguments(output_type="latent", latents=noise.clone())
    pipe(**call, callback_on_step_end=lambda p, i, t, tensors: last.append(tensors["latents"]) or {})
    assert float((last[-1][:1] - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("name", ["sd3", "flux_true_cfg", "sd15"])
@pytest.mark.parametrize("guided", [False, True])
def test_two_prompts_in_one_call_are_the_pictures_of_single_calls(name, guided):
    pipe = make(name)
    vivace.accelerate(pipe, cached(name, plan_of(name, pipe, guided=guided)))
    calls = []
    for seed in range(2):
        call = FAMILIES[name].arguments()
        calls.append({key: v + 0.1 * seed if isinstance(v, torch.Tensor) else v for key, v in call.items()})
    both = {
        key: torch.cat([call[key] for call in calls]) if isinstance(v, torch.Tensor) else v
        for key, v in calls[0].items()
    }
    together = pipe(**both, generator=[torch.Generator().manual_seed(seed) for seed in range(2)])[0]
    for seed, call in enumerate(calls):
        alone = pipe(**call, generator=torch.Generator().manual_seed(seed))[0]
        assert float((together[seed : seed + 1] - alone).norm() / alone.norm()) < 1e-5


@pytest.mark.parametrize("name", ["sd3", "qwen"])
def test_branches_that_do_not_the_same_run_apart(name):
    pipe = make(name)
    blocks = pipe.transformer.config.num_layers
    plan = plan_of(name, pipe, guided=True)

    def ruled(step, *rules):
        return replace(step, variant=replace(step.variant, rules=rules))

    keep = Rule((0, blocks), "residual", ("uncond",), Action.COMPUTE)
    again = Rule((0, blocks), "residual", ("uncond",), Action.REUSE)
    steps = [ruled(step, again if i % 2 else keep) for i, step in enumerate(plan.steps)]
    vivace.accelerate(pipe, replace(plan, steps=tuple(steps), recipe=None))
    seen = []
    handle = (
        pipe.transformer.transformer_blocks[0].ff.register_forward_hook(lambda m, a, o: seen.append(len(o)))
        if name == "sd3"
        else None
    )
    picture(name, pipe, num_inference_steps=4)
    told = vivace.receipt(pipe)
    assert told.caches["reused"] == 2 and told.caches["cells"] == 1
    if handle is not None:  # both rows, then the conditional one alone
        assert sum(seen) == 2 + 1 + 2 + 1
        handle.remove()


def test_two_calls_of_a_step_have_memory_of_their_own():
    pipe = make("qwen")
    plan = cached("qwen", plan_of("qwen", pipe))
    vivace.accelerate(pipe, plan)
    same = FAMILIES["qwen"].arguments()
    for part in ("embeds", "embeds_mask"):
        same[f"negative_prompt_{part}"] = same[f"prompt_{part}"]
    equal = picture("qwen", pipe, **{k: v for k, v in same.items() if k.startswith("negative")})
    assert vivace.receipt(pipe).caches["cells"] == 2 * 6
    assert not torch.equal(equal, picture("qwen", pipe))


def test_a_network_that_kept_nothing_gives_nothing_again():
    pipe = make("wan22")
    plan = plan_of("wan22", pipe)
    rules = [(Rule((0, 3), "residual", action=Action.COMPUTE if i < 1 else Action.REUSE),) for i in range(4)]
    steps = [
        replace(step, variant=replace(step.variant, rules=row)) for step, row in zip(plan.steps, rules, strict=True)
    ]
    vivace.accelerate(pipe, replace(plan, steps=tuple(steps), recipe=None))
    with pytest.raises(StateError, match="network 'transformer_2' kept of branch 'cond', and it kept nothing"):
        picture("wan22", pipe)
    vivace.restore(pipe)
    boundary = 0.75 * pipe.scheduler.config.num_train_timesteps
    guided = apply_experts(plan_of("wan22", pipe, guided=True), below=boundary)
    steps = [
        replace(step, variant=replace(step.variant, rules=row)) for step, row in zip(guided.steps, rules, strict=True)
    ]
    with pytest.raises(PlanError, match="of model 'transformer_2'"):
        vivace.accelerate(pipe, replace(guided, steps=tuple(steps), recipe=None))


@pytest.mark.parametrize("guided", [False, True])
def test_a_call_of_fewer_steps_and_of_part_of_the_run_plans_its_caches_anew(guided):
    pipe = make("sd15")
    vivace.accelerate(pipe, cached("sd15", plan_of("sd15", pipe, 8, guided)))
    picture("sd15", pipe, num_inference_steps=5)
    told = vivace.receipt(pipe)
    assert told.nfe == told.nfe_planned >= 5 and told.rows[0].reused == 0 and told.caches["reused"] > 0
    vivace.restore(pipe)
    half = make("img2img_sd")
    vivace.accelerate(half, cached("sd15", plan_of("sd15", half, 8, guided)))
    picture("img2img_sd", half, num_inference_steps=8, strength=0.5)
    told = vivace.receipt(half)
    assert told.nfe < 8 and told.rows[0].reused == 0 and told.caches["reused"] > 0


def test_a_run_that_starts_anew_keeps_nothing_of_before():
    pipe = make("sd3")
    vivace.accelerate(pipe, cached("sd3", plan_of("sd3", pipe, 6), 3))

    def change(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.9} if step == 1 else {}

    picture("sd3", pipe, num_inference_steps=6, callback_on_step_end=change)
    told = vivace.receipt(pipe)
    assert told.details["restarts"] == 1
    assert [row.reused > 0 for row in told.rows][2] is False


def test_a_further_call_of_a_step_is_a_branch_of_its_own():
    """What a network with skipped layers gives is none of what branch "cond" keeps: a weight of 0 changes nothing."""
    pipe = make("sd3")
    vivace.accelerate(pipe, cached("sd3", plan_of("sd3", pipe, 4)))
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.25, "skip_layer_guidance_stop": 1.0}
    plain = picture("sd3", pipe)
    assert torch.equal(picture("sd3", pipe, skip_layer_guidance_scale=0.0, **skipping), plain)
    assert not torch.equal(picture("sd3", pipe, **skipping), plain)


@pytest.mark.parametrize("guided", [False, True])
def test_latents_written_in_place_start_a_run_anew_before_its_network_runs(guided):
    """The older kind of callback is handed the latents themselves, and nobody tells that it wrote there."""
    pipe = make("pixart")
    vivace.accelerate(pipe, cached("pixart", plan_of("pixart", pipe, 6, guided), 3))

    def change(step, timestep, latents):
        if step == 1:
            latents.mul_(0.9)

    picture("pixart", pipe, num_inference_steps=6, callback=change, callback_steps=1)
    told = vivace.receipt(pipe)
    assert told.details["restarts"] == 1 and len(told.rows) == 6
    assert [row.reused > 0 for row in told.rows][:3] == [False, True, False]


@pytest.mark.parametrize("name", ["sd3", "flux_true_cfg", "wan"])
@pytest.mark.parametrize("guard", ["first_block_cache", "tea_cache"])
@pytest.mark.parametrize("guided", [False, True])
def test_guards_decide_once_a_row_for_the_call(name, guard, guided):
    pipe = make(name)
    plan = plan_of(name, pipe, guided=guided)
    vivace.accelerate(pipe, plan, arithmetic="plan")
    plain = picture(name, pipe)
    vivace.restore(pipe)
    for threshold in (1e-12, 1.0):
        more = {"table": (1.0, 0.0), "last": 0} if guard == "tea_cache" else {}
        vivace.accelerate(pipe, apply_guards(plan, guard, threshold=threshold, **more), kernels=True)
        found, told = picture(name, pipe), vivace.receipt(pipe)
        assert len(told.decisions) == 3 and {decision.fired for decision in told.decisions} <= {(True,), (False,)}
        assert torch.equal(found, plain) == (threshold < 1.0)
        assert (told.caches["reused"] > 0) == (threshold == 1.0)
        assert torch.equal(picture(name, pipe), found)
        vivace.restore(pipe)


def test_what_networks_cannot_run_is_refused_when_accelerating():
    pipe = make("sd15")
    plan = plan_of("sd15", pipe)
    with pytest.raises(
        UnsupportedError, match=r"evaluation 0.*block 1 \(down_blocks.1, DownBlock2D\) has no site 'attn'"
    ):
        vivace.accelerate(pipe, apply_block_cache(plan, "fora", interval=2))
    with pytest.raises(UnsupportedError, match="evaluation 0.*change the shape"):
        vivace.accelerate(pipe, apply_guards(plan, "first_block_cache"))
    bound = plan_of("sd3", make("sd3")).bind(load("sd3").spec)
    with pytest.raises(vivace.ArgumentError, match="bound to a model of 3 blocks, the pipeline's has 4"):
        vivace.accelerate(make("flux"), cached("sd3", bound))


def test_calls_of_several_threads_do_not_meet():
    pipe = make("sd3")
    vivace.accelerate(pipe, cached("sd3", plan_of("sd3", pipe)))
    wanted = [picture("sd3", pipe, prompt_embeds=embeddings(1, 6, 16, seed=seed)) for seed in range(3)]
    found = {}

    def work(seed):
        found[seed] = picture("sd3", pipe, prompt_embeds=embeddings(1, 6, 16, seed=seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], wanted[seed]) for seed in range(3))


def test_nothing_of_a_call_outlives_it():
    pipe = make("sd3")
    vivace.accelerate(pipe, cached("sd3", plan_of("sd3", pipe)))
    picture("sd3", pipe)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is CallCaches]


def test_rows_at_one_timestep_are_told_apart():
    pipe = make("sd15")
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    plan = vivace.Plan.from_diffusers(pipe.scheduler, 4)
    times = [step.timestep for step in plan.steps]
    assert len(set(times)) < len(times)
    deep = cached("sd15", plan)
    vivace.accelerate(pipe, deep)
    first, told = picture("sd15", pipe), vivace.receipt(pipe)
    assert [row.reused > 0 for row in told.rows] == [reads(step) for step in deep.steps if step.variant is not None]
    assert torch.equal(picture("sd15", pipe), first)


def test_another_number_of_pictures_within_a_run_is_refused():
    pipe = make("flux")
    plan = cached("flux", plan_of("flux", pipe))
    caches = CallCaches(plan, pipe.transformer, silent=True)
    call = networks("flux")[0].kwargs
    twice = {k: torch.cat([v, v]) if torch.is_tensor(v) and v.dim() and len(v) == 1 else v for k, v in call.items()}
    with torch.no_grad():
        caches.run(0, "transformer", pipe.transformer, ("cond",), (), call)
        with pytest.raises(StateError, match="hands its network 2 pictures a branch, it began with 1"):
            caches.run(1, "transformer", pipe.transformer, ("cond",), (), twice)
        longer = {**call, "encoder_hidden_states": call["encoder_hidden_states"].repeat(1, 2, 1)}
        longer["txt_ids"] = call["txt_ids"].repeat(2, 1)
        with pytest.raises(RuntimeError, match="a row has"):
            caches.run(1, "transformer", pipe.transformer, ("cond",), (), longer)


def test_hooks_of_layers_see_the_rows_that_compute():
    pipe, seen = make("sd3"), []
    vivace.accelerate(pipe, cached("sd3", plan_of("sd3", pipe)))
    wanted = picture("sd3", pipe)
    block = pipe.transformer.transformer_blocks[0]
    watched = {"block": block, "attention": block.attn, "mlp": block.ff}
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.append(name)) for name, module in watched.items()
    ]
    found = picture("sd3", pipe)
    for handle in handles:
        handle.remove()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert [seen.count(name) for name in watched] == [4, 3, 3]
