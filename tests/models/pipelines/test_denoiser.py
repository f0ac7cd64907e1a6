"""Sessions of foreign models: the latents and pictures of the plain pipeline, whatever the family."""

import threading

import numpy as np
import pytest
import torch
from tests.models.pipelines.tiny import FAMILIES, STEPS, VARIANTS, embeddings, make, picture

import vivace
from vivace.models.pipelines.decode import DecodeOptions

SIZES = ("height", "width", "num_frames", "use_resolution_binning", "clean_caption")
# Combine branches in a way of their own, which no plan does: compared without guidance.
RESCALED = ("qwen",)
# Draws noise of torch in every step: compared with DDIM.
SWAPPED = ("hunyuan_dit",)


def built(name):
    """The tiny pipeline, with a scheduler that plans are made from."""
    import diffusers

    pipe = make(name)
    if name in SWAPPED:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def sizes(name):
    return {key: value for key, value in FAMILIES[name].call.items() if key in SIZES}


def prompt_of(name):
    """What a session is asked with: the call's embeddings, or its label; an embedded guidance scale is a part of it."""
    call = FAMILIES[name].arguments()
    if "class_labels" in call:
        return call["class_labels"][0]
    words = {key: value for key, value in call.items() if "embeds" in key or "mask" in key}
    return words | ({} if FAMILIES[name].guided else {"guidance_scale": call["guidance_scale"]})


def load(name, pipe=None):
    return vivace.load(built(name) if pipe is None else pipe, call=sizes(name))


def plan_of(name, pipe, steps=STEPS, scale=None):
    family = FAMILIES[name]
    plan = pipe.plan(steps)
    guided = family.guided and name not in RESCALED
    return vivace.passes.apply_guidance(plan, scale or family.call[family.scale]) if guided else plan


def plain(name, noise=None, seed=3, **changes):
    """(latents, pictures) of the plain pipeline for a start noise; latents: what its scheduler's last step returned."""
    pipe, last = built(name), []
    own = pipe.scheduler.step

    def step(*args, **kwargs):
        result = own(*args, **kwargs)
        last[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    pipe.scheduler.step = step
    call = FAMILIES[name].arguments(output_type="pil", **changes)
    if name in RESCALED:
        call[FAMILIES[name].scale] = 1.0
    if name == "flux2":  # takes them before it packs them
        noise = noise.transpose(1, 2).unflatten(2, (4, 4))
    start = {} if noise is None else {"latents": noise.clone()}
    output = pipe(**call, **start, generator=torch.Generator().manual_seed(seed), return_dict=False)
    return last[0][:1], output[0]


def noise_of(shape, seed=3):
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "wan22"])
def test_a_session_gives_the_latents_of_the_plain_pipeline(name):
    pipe = load(name)
    noise = noise_of(pipe.spec.latent_shape)
    wanted, _ = plain(name, None if name == "dit" else noise)  # this call takes no latents: it draws the same ones
    got = pipe.compile(plan_of(name, pipe))(prompt_of(name), latents=noise).latents
    assert got.shape == wanted.shape
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_latents_decode_to_the_bits_of_the_plain_pipeline(name):
    family, loaded = FAMILIES[name], load(name)
    latents, pictures = plain(name, None if name == "dit" else noise_of(loaded.spec.latent_shape))
    (denoiser,) = [loaded._denoiser(dict(loaded.networks))]
    decoded = denoiser.to_images(latents)
    wanted = pictures if "num_frames" not in family.call else [pictures[0]]
    assert len(decoded) == 1
    for mine, theirs in zip(np.array(decoded), np.array(wanted), strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("name", ["dit", "sd3", "sd15", "flux", "ltx"])
def test_several_pictures_of_one_request_are_the_pictures_of_single_ones(name):
    pipe = load(name)
    session = pipe.compile(plan_of(name, pipe, 2))
    both = session(prompt_of(name), n=2, seed=4)
    for j in range(2):
        alone = session(prompt_of(name), index=j, seed=4)
        assert torch.equal(both.latents[j : j + 1], alone.latents)
        assert np.array_equal(np.array(both.images[j]), np.array(alone.images[0]))


def test_prompts_of_other_lengths_share_a_step_and_keep_their_bits():
    pipe = load("sd3")
    session = pipe.compile(plan_of("sd3", pipe, 2))
    short, long = prompt_of("sd3"), prompt_of("sd3")
    for sign in ("", "negative_"):
        long[f"{sign}prompt_embeds"] = embeddings(1, 9, 16, seed=8)
    states = [session.begin(vivace.Request(prompt, seed=i)) for i, prompt in enumerate((short, long, None))]
    while not states[0].done:
        session.step(states)
    for i, (state, prompt) in enumerate(zip(states, (short, long, None), strict=True)):
        assert torch.equal(session.finish(state).latents, session(prompt, seed=i).latents)


def test_the_second_expert_of_a_pipeline_is_the_models_column():
    pipe = load("wan22")
    denoiser = pipe._denoiser(dict(pipe.networks))
    x = noise_of(pipe.spec.latent_shape)
    for model, name in (("main", "transformer"), ("transformer_2", "transformer_2")):
        variant = vivace.Variant(model=model, branches=("cond", "uncond"))
        outs = denoiser.evaluate(x, [500.0], [denoiser.encode(prompt_of("wan22"))], variant)
        for out, key in zip(outs, ("prompt_embeds", "negative_prompt_embeds"), strict=True):
            with torch.no_grad():
                wanted = pipe.networks[name](x, torch.tensor([500.0]), prompt_of("wan22")[key]).sample
            assert float((out - wanted).norm() / wanted.norm()) < 1e-5
    expanded = pipe._expanded(plan_of("wan22", pipe))
    assert [step.variant.model for step in expanded.steps] == ["main", "main", "main", "transformer_2"]


def test_a_plan_with_guidance_refuses_a_prompt_without_its_unconditional_branch():
    pipe = load("sd3")
    session = pipe.compile(plan_of("sd3", pipe))
    lone = {name: value for name, value in prompt_of("sd3").items() if not name.startswith("negative")}
    with pytest.raises(vivace.PromptError, match="negative_prompt_embeds"):
        session(lone)
    assert session(lone, plan=pipe.plan(2)).receipt.branch_evals == 2


@pytest.mark.parametrize(
    ("name", "prompt", "fragment"),
    [
        ("sd3", {"prompt_embed": 1}, "no arguments of StableDiffusion3Pipeline"),
        ("sd3", {"guidance_scale": 2.0}, "the plan and the session decide"),
        ("sd3", {"prompt_embeds": embeddings(1, 6, 16)}, "cannot encode it"),
        ("sd3", {name: torch.cat([v, v]) for name, v in prompt_of("sd3").items()}, "2 pictures"),
        ("flux", {"prompt_embeds": embeddings(2, 6, 16), "pooled_prompt_embeds": embeddings(2, 16)}, "2 pictures"),
        ("sd3", prompt_of("sd3") | {"height": 32}, "its latents have shape"),
        ("sd3", "a heart", "no text encoder"),
        ("sd3", 7, "int"),
        ("dit", 5000, "from 0 to 999"),
        ("dit", "no such class", "no such class"),
    ],
)
def test_a_bad_prompt_is_refused_before_any_work(name, prompt, fragment):
    pipe = load(name)
    session = pipe.compile(pipe.plan(2))
    with pytest.raises(vivace.PromptError, match=fragment):
        session(prompt)
    assert session.pool.state.shape[1] == 0 or len(session.pool._free) == session.pool.state.shape[1]


def test_no_session_for_what_changes_along_the_run():
    pipe = make("controlnet_sd")
    with pytest.raises(vivace.UnsupportedError, match="down_block_additional_residuals.*vivace.accelerate"):
        loaded = vivace.load(pipe, call=sizes("sd15") | {"image": VARIANTS["controlnet_sd"].call["image"]})
        loaded.compile(loaded.plan(2))


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_image_to_image_starts_from_the_encoded_picture(name):
    from PIL import Image

    pipe = load(name)
    session = pipe.compile(pipe.plan(4))
    image = Image.fromarray((picture()[0].permute(1, 2, 0) * 255).byte().numpy()).resize((40, 40))
    start = session.denoiser.to_latent(image)
    assert tuple(start.shape) == pipe.spec.latent_shape
    tail = pipe.plan(4).tail(0.5)
    given = session(prompt_of(name), plan=tail, image=image, seed=1)
    assert 0 < given.receipt.nfe == tail.nfe < pipe.plan(4).nfe
    assert torch.equal(given.latents, session(prompt_of(name), plan=tail, image=start, seed=1).latents)
    with pytest.raises(vivace.UnsupportedError, match="no image-to-image sibling"):
        load("wan").compile(load("wan").plan(2)).denoiser.to_latent(image)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "sdxl", "lumina2", "cogvideox"])
def test_other_dtypes_run_on_copies(name):
    pipe = load(name)
    plan = plan_of(name, pipe)
    exact = pipe.compile(plan, dtype="float64")(prompt_of(name), seed=2).latents
    assert exact.dtype == torch.float64
    for dtype, bound in ((None, 1e-4), ("bfloat16", 0.3)):
        got = pipe.compile(plan, dtype=dtype)(prompt_of(name), seed=2).latents
        assert float((got - exact).norm() / exact.norm()) < bound
    assert next(iter(pipe.networks.values())).dtype == torch.float32


def test_decoding_as_asked_is_reported():
    whole, options = load("sd15"), DecodeOptions(precision="bf16")
    plan = whole.plan(1)
    low = vivace.load(built("sd15"), call=sizes("sd15"), decode=options).compile(plan)
    exact, lowered = (session(prompt_of("sd15"), seed=1) for session in (whole.compile(plan), low))
    assert torch.equal(exact.latents, lowered.latents)
    apart = np.abs(np.array(exact.images[0], dtype=int) - np.array(lowered.images[0]))
    assert 0 < apart.max() < 32
    assert low.denoiser.reports()["decode"]["dtype"] == "bfloat16"


def test_sixteen_threads_get_the_pictures_of_one():
    pipe = load("sd3")
    plans = [plan_of("sd3", pipe, steps, scale) for steps, scale in ((1, 2.0), (2, 5.0))]
    session = pipe.compile(plans)
    prompts = []
    for seed in range(5):
        words = {f"{sign}prompt_embeds": embeddings(1, 4 + seed % 2, 16, seed=seed) for sign in ("", "negative_")}
        prompts.append(prompt_of("sd3") | words)
    asked = [
        {"prompt": prompts[i % 5], "plan": plans[i % 2], "seed": i, "guidance_scale": 1.0 + i % 4} for i in range(25)
    ]
    wanted = [session(**request) for request in asked]
    found, failed = {}, []

    def work(thread):
        try:
            for i in range(25):
                j = (i + thread * 3) % 25
                got = session(**asked[j])
                same = got.images[0].tobytes() == wanted[j].images[0].tobytes()
                found[thread, i] = same and torch.equal(got.latents, wanted[j].latents)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(found) == 16 * 25 and all(found.values())
