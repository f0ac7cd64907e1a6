"""The manners of an accelerated pipeline: steps, guidance, callbacks, draws, threads, adapters, hooks, mistakes."""

import copy
import pickle
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tests.models.pipelines import texts, tiny

import vivace

ALL = {**tiny.FAMILIES, **tiny.VARIANTS}


@pytest.fixture
def build():
    """Pipelines made once a test, restored at its end where the test left them accelerated."""
    made = []

    def build(name):
        made.append(tiny.make(name))
        return made[-1]

    yield build
    for pipe in made:
        if "_vivace_acceleration" in pipe.__dict__:
            vivace.restore(pipe)


def run(pipe, name, seed=0, **changes):
    arguments = ALL[name].arguments(**changes)
    arguments = {key: value for key, value in arguments.items() if value != "left out"}
    return torch.as_tensor(pipe(**arguments, generator=torch.Generator().manual_seed(seed))[0])


def plan_for(pipe, solver="unipc", steps=4, **options):
    prediction = {"flow": "flow"}.get(vivace.NoiseSchedule.from_diffusers(pipe.scheduler).kind, "eps")
    schedule = vivace.NoiseSchedule.from_diffusers(pipe.scheduler)
    return vivace.make_plan(schedule, solver=solver, steps=steps, prediction=prediction, **options)


def evaluations(pipe, part="unet"):
    """A list that grows with every forward of a network."""
    seen = []
    getattr(pipe, part).register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


# --- steps ------------------------------------------------------------------------------------------------------------
def test_another_step_count_is_planned_from_the_recipe(build):
    pipe = build("sd15")
    vivace.accelerate(pipe, plan_for(pipe, steps=6))
    six = run(pipe, "sd15", num_inference_steps=6)
    vivace.restore(pipe)
    vivace.accelerate(pipe, plan_for(pipe, steps=4))
    assert torch.equal(run(pipe, "sd15", num_inference_steps=6), six)
    assert vivace.receipt(pipe).nfe == vivace.receipt(pipe).nfe_planned == 6


def test_a_call_without_a_step_count_runs_the_plans(build):
    pipe = build("sd15")
    vivace.accelerate(pipe, plan_for(pipe, steps=3))
    run(pipe, "sd15", num_inference_steps="left out")
    assert vivace.receipt(pipe).nfe == 3


def test_another_step_count_of_a_plan_without_recipe_is_refused_before_any_work(build):
    pipe = build("sd15")
    seen = evaluations(pipe)
    vivace.accelerate(pipe, replace(plan_for(pipe, steps=4), recipe=None))
    with pytest.raises(vivace.ArgumentError, match=r"num_inference_steps=6: the plan has 4 rows and no recipe"):
        run(pipe, "sd15", num_inference_steps=6)
    assert not seen
    run(pipe, "sd15", num_inference_steps=4)
    assert len(seen) == 4


def test_strength_is_the_plans_tail_with_the_rounding_of_diffusers(build):
    pipe = build("img2img_sd")
    vivace.accelerate(pipe, plan_for(pipe, "dpmpp_2m", steps=7))
    for strength, left in ((1.0, 7), (0.6, 4), (0.29, 2), (0.15, 1)):
        run(pipe, "img2img_sd", strength=strength, num_inference_steps=7)
        assert vivace.receipt(pipe).nfe == vivace.receipt(pipe).nfe_planned == left


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc", "heun", "euler_ancestral", "dpmpp_2s"])
def test_solvers_the_pipeline_has_not_run_in_its_loop_as_in_a_plain_one(build, solver):
    pipe = build("sd15")
    plan = plan_for(pipe, solver, steps=3)
    vivace.accelerate(pipe, plan, kernels=False)
    picture = run(pipe, "sd15", num_inference_steps="left out")
    arguments, draws = tiny.FAMILIES["sd15"].arguments(), torch.Generator().manual_seed(0)
    text = torch.cat([arguments["negative_prompt_embeds"], arguments["prompt_embeds"]])
    start = torch.randn(picture.shape, generator=draws)

    def denoiser(x, t):
        noise = pipe.unet(torch.cat([x, x]), t[:1], encoder_hidden_states=text)[0]
        return noise[:1] + arguments["guidance_scale"] * (noise[1:] - noise[:1])

    count = sum(slot.startswith("noise:") for step in plan.steps for op in step.ops for slot, _ in op.terms)
    drawn = [torch.randn(picture.shape, generator=draws) for _ in range(count)]
    with torch.no_grad():
        expected = by_hand(plan, denoiser, start, drawn)
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-5)


def by_hand(plan, denoiser, noise, draws):
    """The plan's ops, one after the other, on float64 slots."""
    slots = {"noise:0": noise.double(), "one": torch.ones((), dtype=torch.float64)}
    names = [slot for step in plan.steps for op in step.ops for slot, _ in op.terms if slot.startswith("noise:")]
    slots |= {name: draw.double() for name, draw in zip(dict.fromkeys(names), draws, strict=False)}
    for op in plan.init:
        slots[op.dst] = sum(c * slots[s] for s, c in op.terms)
    for step in plan.steps:
        slots[step.outs[0]] = denoiser((step.x_scale * slots[step.x]).float(), torch.tensor([step.timestep])).double()
        for op in step.ops:
            slots[op.dst] = sum(c * slots[s] for s, c in op.terms)
    return slots["x"].float()


# --- guidance ---------------------------------------------------------------------------------------------------------
def test_the_calls_scale_is_the_plans_input(build):
    pipe = build("sd3")
    guided = {scale: vivace.passes.apply_guidance(plan_for(pipe), scale) for scale in (3.0, 5.0)}
    vivace.accelerate(pipe, guided[5.0])
    five = run(pipe, "sd3", guidance_scale="left out")
    vivace.restore(pipe)
    vivace.accelerate(pipe, guided[3.0])
    assert torch.equal(run(pipe, "sd3", guidance_scale=5.0), five)
    assert not torch.equal(run(pipe, "sd3", guidance_scale="left out"), five)


@pytest.mark.parametrize(
    ("name", "without"), [("sd3", {"guidance_scale": 1.0}), ("flux_true_cfg", {"true_cfg_scale": 1.0})]
)
def test_a_guided_row_without_an_unconditional_branch_is_refused_before_the_first(build, name, without):
    pipe = build(name)
    seen = evaluations(pipe, "transformer")
    schedule = vivace.NoiseSchedule.flow(shift=3.0)
    plan = vivace.make_plan(schedule, solver="flow_euler", steps=4, prediction="flow")
    vivace.accelerate(pipe, vivace.passes.apply_guidance(plan, 3.0))
    with pytest.raises(vivace.ArgumentError, match=r"rows 0\.\.3 of the plan evaluate cond and uncond, but this call"):
        run(pipe, name, **without)
    assert not seen


def test_a_scale_without_guidance_in_the_plan_is_the_pipelines_own(build):
    pipe = build("sd3")
    low, high = run(pipe, "sd3", guidance_scale=2.0), run(pipe, "sd3", guidance_scale=6.0)
    vivace.accelerate(pipe, vivace.Plan.from_diffusers(pipe.scheduler, steps=4), arithmetic="plan", kernels=False)
    torch.testing.assert_close(run(pipe, "sd3", guidance_scale=2.0), low)
    torch.testing.assert_close(run(pipe, "sd3", guidance_scale=6.0), high)


def test_an_unknown_pipeline_takes_plans_without_guidance_only(build):
    pipe = build("sd3")
    pipe.__class__ = type("MyPipeline", (type(pipe),), {})
    with pytest.raises(vivace.UnsupportedError, match=r'STYLES\["My"\] = CallStyle'):
        vivace.accelerate(pipe, vivace.passes.apply_guidance(plan_for(pipe), 3.0))
    plain = run(pipe, "sd3")
    vivace.accelerate(pipe)
    assert torch.equal(run(pipe, "sd3"), plain)


def test_the_models_of_a_row_are_the_plans(build):
    pipe = build("wan22")
    seen = {part: evaluations(pipe, part) for part in ("transformer", "transformer_2")}
    plan = vivace.passes.apply_guidance(vivace.Plan.from_diffusers(pipe.scheduler, steps=4), 3.0)
    vivace.accelerate(pipe, vivace.passes.apply_experts(plan, below=plan.steps[3].timestep + 1e-3))
    run(pipe, "wan22")
    assert {part: len(calls) for part, calls in seen.items()} == {"transformer": 6, "transformer_2": 2}


# --- callbacks --------------------------------------------------------------------------------------------------------
def test_latents_changed_by_a_callback_restart_the_history(build):
    pipe = build("sd3")
    vivace.accelerate(pipe, plan_for(pipe, "dpmpp_2m", steps=5))
    fresh = tiny.embeddings(1, 4, 8, 8, seed=8)

    def change(pipeline, i, t, tensors):
        return {"latents": fresh.reshape(tensors["latents"].shape)} if i == 2 else tensors

    pictures = [run(pipe, "sd3", seed, num_inference_steps=5, callback_on_step_end=change) for seed in (0, 1)]
    assert torch.equal(*pictures)  # nothing from before the change is read
    assert vivace.receipt(pipe).details["restarts"] == 1


def test_a_callback_that_writes_the_latents_in_place_is_noticed(build):
    pipe = build("sd3")
    vivace.accelerate(pipe, plan_for(pipe, "dpmpp_2m", steps=5))

    def change(pipeline, i, t, tensors):
        if i == 1:
            tensors["latents"].zero_()
        return tensors

    pictures = [run(pipe, "sd3", seed, num_inference_steps=5, callback_on_step_end=change) for seed in (0, 1)]
    assert torch.equal(*pictures) and vivace.receipt(pipe).details["restarts"] == 1


def test_a_callback_that_only_looks_changes_nothing(build):
    pipe = build("sd3")
    vivace.accelerate(pipe, plan_for(pipe, "dpmpp_2m", steps=5))
    seen = []

    def look(pipeline, i, t, tensors):
        seen.append((pipeline is pipe, i, float(t), tuple(tensors["latents"].shape)))
        return tensors

    watched = run(pipe, "sd3", num_inference_steps=5, callback_on_step_end=look)
    assert "restarts" not in vivace.receipt(pipe).details
    assert torch.equal(watched, run(pipe, "sd3", num_inference_steps=5))
    assert [entry[:2] for entry in seen] == [(True, i) for i in range(5)]


@pytest.mark.parametrize("arithmetic", ["auto", "plan"])
def test_interrupt_ends_the_rows(build, arithmetic):
    pipe = build("sd3")
    vivace.accelerate(pipe, arithmetic=arithmetic)

    def stop(pipeline, i, t, tensors):
        pipe._interrupt = i == 1
        return tensors

    run(pipe, "sd3", callback_on_step_end=stop)
    assert (vivace.receipt(pipe).nfe, vivace.receipt(pipe).nfe_planned) == (2, 4)


# --- draws and outputs ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        EulerAncestralDiscreteScheduler(),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        LCMScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_draws_come_from_the_calls_generator_in_the_order_of_diffusers(build, scheduler):
    pipe = build("sd15")
    pipe.scheduler = scheduler
    states = []
    for accelerated in (False, True):
        if accelerated:
            vivace.accelerate(pipe, arithmetic="plan", kernels=False)
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        call = tiny.FAMILIES["sd15"].arguments(num_images_per_prompt=2)
        states.append((pipe(**call, generator=generators)[0], [g.get_state() for g in generators]))
    (plain, before), (picture, after) = states
    assert (picture - plain).abs().max() < 1e-4 * plain.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("output", ["np", "pt", "pil"])
def test_output_types_are_the_pipelines(build, output):
    pipe = build("sd15")
    results = []
    for accelerated in (False, True):
        if accelerated:
            vivace.accelerate(pipe)
        call = tiny.FAMILIES["sd15"].arguments(output_type=output)
        results.append(pipe(**call, generator=torch.Generator().manual_seed(0)))
    plain, made = results
    assert type(plain) is type(made) and type(plain.images[0]) is type(made.images[0])
    tobytes = (lambda image: image.tobytes()) if output == "pil" else (lambda image: torch.as_tensor(image).tolist())
    assert tobytes(plain.images[0]) == tobytes(made.images[0])


def test_another_scheduler_set_later_is_the_one_that_runs(build):
    pipe, other = build("sd15"), build("sd15")
    vivace.accelerate(pipe)
    for each in (pipe, other):
        each.scheduler = UniPCMultistepScheduler.from_config(each.scheduler.config)
    assert torch.equal(run(pipe, "sd15"), run(other, "sd15"))
    assert "UniPC" in vivace.receipt(pipe).kernels[0].reason


# --- adapters, hooks, copies ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arithmetic", ["auto", "plan"])
def test_lora_loaded_into_an_accelerated_pipeline_acts_and_goes(build, arithmetic):
    pipe, plain = build("sd15"), build("sd15")
    base = run(plain, "sd15")
    vivace.accelerate(pipe, arithmetic=arithmetic)
    torch.testing.assert_close(run(pipe, "sd15"), base)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    donor = build("sd15").unet
    torch.manual_seed(1)
    donor.add_adapter(config)
    weights = {f"unet.{name}": value for name, value in get_peft_model_state_dict(donor).items()}
    for each in (pipe, plain):
        each.load_lora_weights(dict(weights))
    expected = run(plain, "sd15")
    assert not torch.allclose(expected, base)
    torch.testing.assert_close(run(pipe, "sd15"), expected)
    pipe.unload_lora_weights()
    torch.testing.assert_close(run(pipe, "sd15"), base)


def ip_adapter(unet, width=12):
    """Weights of an adapter for a UNet, as `load_ip_adapter` reads them."""
    weights, number = {}, 1
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            for part in ("k", "v"):
                weights[f"{number}.to_{part}_ip.weight"] = tiny.embeddings(*module.to_k.weight.shape, seed=number)
            number += 2
    tokens, cross = 4, unet.config.cross_attention_dim
    image = {"proj.weight": tiny.embeddings(tokens * cross, width), "proj.bias": torch.zeros(tokens * cross)}
    image |= {"norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}
    return {"image_proj": image, "ip_adapter": weights}


@pytest.mark.parametrize("interval", [None, (0.0, 1.0), (0.0, 0.5)])
def test_ip_adapter_inputs_pass_through(build, interval):
    pipe, plain = build("sd15"), build("sd15")
    for each in (pipe, plain):
        each.unet._load_ip_adapter_weights([ip_adapter(each.unet)])
    embeds = {"ip_adapter_image_embeds": [tiny.embeddings(2, 1, 12, seed=4)]}
    expected = run(plain, "sd15", **embeds)
    other = run(plain, "sd15", ip_adapter_image_embeds=[2 * tiny.embeddings(2, 1, 12, seed=4)])
    assert not torch.allclose(other, expected)
    plan = vivace.Plan.from_diffusers(pipe.scheduler, steps=4)
    if interval is not None:
        plan = vivace.passes.apply_guidance(plan, 7.5, interval=interval)
    vivace.accelerate(pipe, plan, arithmetic="plan")
    picture = run(pipe, "sd15", **embeds)
    if interval == (0.0, 0.5):
        assert torch.isfinite(picture).all() and vivace.receipt(pipe).branch_evals < 2 * vivace.receipt(pipe).nfe
    else:
        torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arithmetic", ["auto", "plan"])
def test_offload_hooks_keep_working(build, arithmetic):
    pipe, plain = build("sd3"), build("sd3")
    _, hook = cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
    vivace.accelerate(pipe, arithmetic=arithmetic)
    torch.testing.assert_close(run(pipe, "sd3"), run(plain, "sd3"))
    hook.remove()
    torch.testing.assert_close(run(pipe, "sd3"), run(plain, "sd3"))


def test_to_moves_an_accelerated_pipeline(build):
    pipe = build("sd3")
    vivace.accelerate(pipe)
    run(pipe, "sd3")
    pipe.to(torch.float64)
    call = tiny.FAMILIES["sd3"].arguments(torch.float64)
    assert pipe(**call, generator=torch.Generator().manual_seed(0))[0].dtype == torch.float64
    assert pipe.transformer.dtype == torch.float64 and vivace.receipt(pipe).dtype == "float64"


def test_copies_and_siblings_stand_on_their_own(build):
    pipe = build("sd15")
    vivace.accelerate(pipe)
    plain = run(pipe, "sd15")
    twin = copy.deepcopy(pipe)
    assert torch.equal(run(twin, "sd15"), plain)
    vivace.restore(twin)
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    sibling.set_progress_bar_config(disable=True)
    assert torch.equal(run(sibling, "img2img_sd"), run(build("img2img_sd"), "img2img_sd"))
    assert vivace.receipt(pipe).nfe == 5


def test_a_failing_call_leaves_the_pipeline_ready(build):
    pipe = build("sd3")
    vivace.accelerate(pipe)
    plain = run(pipe, "sd3")
    with pytest.raises(ValueError, match="height"):
        run(pipe, "sd3", height=13)
    with pytest.raises(TypeError):
        pipe(no_such_argument=1)

    def fail(pipeline, i, t, tensors):
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        run(pipe, "sd3", callback_on_step_end=fail)
    assert type(pipe.scheduler).__mro__[0] is type(tiny.make("sd3").scheduler)
    assert torch.equal(run(pipe, "sd3"), plain)


# --- threads ----------------------------------------------------------------------------------------------------------
def test_four_threads_get_the_pictures_of_one(build):
    pipe = build("sd15")
    vivace.accelerate(pipe, plan_for(pipe, "dpmpp_2m", steps=4))
    calls = [
        {
            "prompt_embeds": tiny.embeddings(1, tiny.TEXT, tiny.WIDTH, seed=10 + k),
            "num_inference_steps": 2 + k % 3,
            "guidance_scale": 2.0 + k,
            "seed": k,
        }
        for k in range(12)
    ]
    alone = [run(pipe, "sd15", **call) for call in calls]
    found = [None] * len(calls)
    receipts = {}

    def work(first):
        for k in range(first, len(calls), 4):
            found[k] = run(pipe, "sd15", **calls[k])
            receipts[k] = vivace.receipt(pipe).nfe

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    assert receipts == {k: 2 + k % 3 for k in range(12)}


# --- mistakes ---------------------------------------------------------------------------------------------------------
def test_mistakes_have_one_clear_message(build):
    pipe = build("sd3")
    plan = plan_for(pipe)
    with pytest.raises(vivace.StateError, match="restore: the pipeline is not accelerated"):
        vivace.restore(pipe)
    with pytest.raises(vivace.ArgumentError, match="need a diffusers pipeline with a scheduler and a denoiser"):
        vivace.accelerate(torch.nn.Linear(1, 1), plan)
    with pytest.raises(vivace.ArgumentError, match="a str for the plan"):
        vivace.accelerate(pipe, "unipc")
    reused = vivace.Rule((0, 1), "cross_attn", action=vivace.Action.REUSE)
    stored = replace(plan.steps[0].variant, rules=(vivace.Rule((0, 1), "cross_attn", action=vivace.Action.COMPUTE),))
    steps = (replace(plan.steps[0], variant=stored), replace(plan.steps[1], variant=replace(stored, rules=(reused,))))
    with pytest.raises(vivace.UnsupportedError, match="evaluation 0: a pipeline's network.*has no site 'cross_attn'"):
        vivace.accelerate(pipe, replace(plan, steps=(*steps, *plan.steps[2:])))
    assert "_vivace_acceleration" not in pipe.__dict__
    vivace.accelerate(pipe, plan)
    with pytest.raises(vivace.StateError, match="receipt: the pipeline made no call yet"):
        vivace.receipt(pipe)
    with pytest.raises(vivace.StateError, match="accelerated already"):
        vivace.accelerate(pipe, plan)

    def again(pipeline, i, t, tensors):
        run(pipe, "sd3")

    with pytest.raises(vivace.StateError, match="called from inside its own call"):
        run(pipe, "sd3", callback_on_step_end=again)
    with pytest.raises(vivace.StateError, match="called from inside a call"):
        run(pipe, "sd3", callback_on_step_end=lambda pipeline, i, t, tensors: vivace.restore(pipe))


# --- what others do around a call -------------------------------------------------------------------------------------
@pytest.mark.parametrize("arithmetic", ["auto", "plan"])
def test_inference_mode_and_callbacks_mix(build, arithmetic):
    pipe = build("sd3")
    vivace.accelerate(pipe, arithmetic=arithmetic, kernels=False)
    plain = run(pipe, "sd3")
    with torch.inference_mode():
        torch.testing.assert_close(run(pipe, "sd3"), plain)
        looked = run(pipe, "sd3", callback_on_step_end=lambda pipeline, i, t, tensors: tensors)
        torch.testing.assert_close(looked, plain)
        assert "restarts" not in vivace.receipt(pipe).details

        def change(pipeline, i, t, tensors):
            tensors["latents"].mul_(0.5 if i == 1 else 1.0)
            return tensors

        run(pipe, "sd3", callback_on_step_end=change)
        assert vivace.receipt(pipe).details.get("restarts", 0) == (arithmetic == "plan")


class Slotted:
    """A callback that is an object."""

    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def __call__(self, pipeline, i, t, tensors):
        self.calls += 1
        return tensors


def test_callbacks_of_any_kind_are_called(build):
    pipe = build("sd3")
    vivace.accelerate(pipe)
    slotted, seen = Slotted(), []
    run(pipe, "sd3", callback_on_step_end=slotted)
    run(
        pipe, "sd3", callback_on_step_end=partial(lambda kept, pipeline, i, t, tensors: kept.append(i) or tensors, seen)
    )

    class Own(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            seen.append(step_index)
            return callback_kwargs

    run(pipe, "sd3", callback_on_step_end=Own())
    assert slotted.calls == 4 and seen == [0, 1, 2, 3] * 2


def test_guidance_cut_by_a_callback_is_the_plans_to_cut(build):
    pipe = build("sd15")
    plan = vivace.Plan.from_diffusers(pipe.scheduler, steps=4)
    guided = vivace.passes.apply_guidance(plan, 7.5)
    vivace.accelerate(pipe, guided, arithmetic="plan")
    with pytest.raises(vivace.StateError, match=r"apply_guidance\(plan, interval="):
        run(pipe, "sd15", callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))
    vivace.restore(pipe)
    vivace.accelerate(pipe)
    cut = run(pipe, "sd15", callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))
    vivace.restore(pipe)
    assert torch.equal(cut, run(pipe, "sd15", callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5)))


def test_objects_made_from_an_accelerated_one_are_plain_and_pickles_are(build):
    pipe = build("sd15")
    plain = run(pipe, "sd15")
    vivace.accelerate(pipe)
    again = type(pipe)(**pipe.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, "sd15"), plain)
    thawed = pickle.loads(pickle.dumps(pipe))
    assert type(thawed) is type(pipe).__mro__[1] and torch.equal(run(thawed, "sd15"), plain)
    assert copy.copy(pipe).unet is pipe.unet


def test_a_session_of_an_accelerated_pipeline_is_that_of_the_plain_one(build):
    pipe = build("sd3")
    plan = vivace.Plan.from_diffusers(pipe.scheduler, steps=2)
    prompt = {name: value for name, value in tiny.FAMILIES["sd3"].arguments().items() if "embeds" in name}
    options = {"call": {"height": 16, "width": 16}}
    plain = vivace.load(pipe, **options).compile(plan)(prompt, seed=3).latents
    vivace.accelerate(pipe, plan)
    assert torch.equal(vivace.load(pipe, **options).compile(plan)(prompt, seed=3).latents, plain)


class OwnEuler(EulerDiscreteScheduler):
    """A user's subclass."""


def test_a_subclass_of_a_scheduler_runs_plans(build):
    pipe, other = build("sdxl"), build("sdxl")
    pipe.scheduler = OwnEuler.from_config(pipe.scheduler.config)
    vivace.accelerate(pipe, vivace.Plan.from_diffusers(other.scheduler, steps=4), kernels=False)
    picture, plain = run(pipe, "sdxl"), run(other, "sdxl")
    assert (picture - plain).abs().max() < 1e-4 * plain.abs().max()


@pytest.mark.parametrize("name", ["img2img_sd", "inpaint_sd"])
def test_a_scheduler_with_a_grid_of_its_own_for_tails_keeps_the_rows_of_the_full_one(build, name):
    pipe = build(name)
    pipe.scheduler = LCMScheduler()
    plain = run(pipe, name, num_inference_steps=6)
    vivace.accelerate(pipe, arithmetic="plan", kernels=False)
    picture = run(pipe, name, num_inference_steps=6)
    assert (picture - plain).abs().max() < 1e-4 * plain.abs().max()


def test_further_calls_of_the_pipelines_own_guidance_are_answered(build):
    pipe = build("sd3")
    plan = vivace.passes.apply_guidance(vivace.Plan.from_diffusers(pipe.scheduler, steps=4), 5.0)
    vivace.accelerate(pipe, plan, arithmetic="plan")
    arguments = tiny.FAMILIES["sd3"].arguments()
    two = {name: value.repeat_interleave(2, 0) for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    run(pipe, "sd3", skip_guidance_layers=[0], skip_layer_guidance_stop=1.0, **two)
    assert "skip_guidance_layers had no effect" in " ".join(vivace.receipt(pipe).warnings)
    assert vivace.receipt(pipe).branch_evals == 8


def test_a_call_that_ends_early_says_so(build):
    pipe = build("sdxl")
    vivace.accelerate(pipe)
    run(pipe, "sdxl", num_inference_steps=10, denoising_end=0.6)
    assert any("were not run: the call ended early" in line for line in vivace.receipt(pipe).warnings)


def test_plans_that_do_not_fit_are_refused_before_any_work(build):
    pipe, video = build("sd15"), build("sd3")
    schedule = vivace.NoiseSchedule.from_diffusers(pipe.scheduler)
    with pytest.raises(
        vivace.ArgumentError, match="the plan is for prediction 'v', the pipeline's PNDMScheduler for 'eps'"
    ):
        vivace.accelerate(pipe, vivace.make_plan(schedule, steps=4, prediction="v"))
    with pytest.raises(vivace.ArgumentError, match="for prediction 'eps', the pipeline's FlowMatchEuler"):
        vivace.accelerate(video, vivace.make_plan(schedule, steps=4))
    with pytest.raises(vivace.ArgumentError, match="the plan is a tail"):
        vivace.accelerate(pipe, vivace.make_plan(schedule, steps=4).tail(0.5))
    vivace.accelerate(pipe, vivace.make_plan(schedule, steps=4))
    with pytest.raises(vivace.ArgumentError, match=r"eta=1\.0: the plan decides the noise"):
        run(pipe, "sd15", eta=1.0)
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    vivace.restore(pipe)
    vivace.accelerate(pipe, vivace.passes.apply_guidance(vivace.make_plan(schedule, steps=4), 3.0))
    with pytest.raises(vivace.ArgumentError, match="no unconditional branch"):
        run(pipe, "sd15")


def test_three_branches_are_left_to_the_pipeline(build):
    pipe = build("sd15")
    pipe.__class__ = type("StableDiffusionPAGPipeline", (type(pipe),), {})
    with pytest.raises(vivace.UnsupportedError, match="how it runs guidance is not known"):
        vivace.accelerate(pipe, vivace.passes.apply_guidance(plan_for(pipe), 3.0))


@pytest.mark.parametrize("name", ["wan", "ltx", "sana", "hunyuan_video", "sd3", "sd15"])
def test_float64_runs_under_a_plan(build, name):
    pipe = build(name).to(torch.float64)
    call = tiny.FAMILIES[name].arguments(torch.float64)
    pictures = []
    for accelerated in (False, True):
        if accelerated:
            vivace.accelerate(pipe, arithmetic="plan")
        pictures.append(torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(0))[0]).double())
    assert (pictures[1] - pictures[0]).abs().max() < 1e-5 * pictures[0].abs().max()


def test_text_and_pictures_stand_in_the_receipt():
    pipe = texts.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}

    def draw(prompt):
        return pipe(prompt, **call, generator=torch.Generator().manual_seed(0)).images

    plain = draw("a cat")
    vivace.accelerate(pipe)
    assert (draw("a cat") == plain).all() and vivace.receipt(pipe).details["prompts"] == ["miss"]
    assert (draw("a cat") == plain).all() and vivace.receipt(pipe).details["prompts"] == ["hit"]
    draw("a dog")
    assert vivace.receipt(pipe).details["prompts"] == ["miss"]
    assert vivace.receipt(pipe).details["decode"] == "as the pipeline does"
    vivace.restore(pipe)
    vivace.accelerate(pipe, prompt_bytes=0, decode=vivace.DecodeOptions(precision="bf16", tiled=True))
    draw("a cat")
    details = vivace.receipt(pipe).details
    assert "prompts" not in details and details["decode"]["dtype"] == "bfloat16"
    assert details["decode"]["layout"] == "channels_last" and "encode_prompt" not in pipe.__dict__
