"""Prompt embeddings come back from the cache as the text encoder would make them, or not at all."""

import re
import threading
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PixArtAlphaPipeline, StableDiffusion3Pipeline
from tests.models.pipelines.texts import (
    LENGTH,
    TEXTS,
    Encode,
    clip_config,
    clip_tokenizer,
    same,
    stable_diffusion,
    t5_encoder,
    t5_tokenizer,
)
from transformers import CLIPTextModelWithProjection

from vivace.errors import ArgumentError
from vivace.models.pipelines.prompts import PromptCache, cached_encode_prompt
from vivace.models.pipelines.views import view


@pytest.fixture
def pipe():
    return stable_diffusion()


@pytest.fixture
def cache():
    return PromptCache()


def test_the_second_call_hits_with_the_same_bits(pipe, cache):
    encode = Encode(pipe, cache)
    encode()
    encode()
    assert encode.outcomes == ["miss", "hit"]
    summary = cache.summary()
    assert (summary["hits"], summary["misses"], summary["entries"]) == (1, 1, 1)
    assert summary["bytes"] == 2 * LENGTH * 16 * 4 and summary["bypassed"] == {}


def test_positional_and_named_arguments_are_one_call(pipe, cache):
    encode = Encode(pipe, cache)
    encode()
    with torch.no_grad():
        encode.cached(TEXTS[0], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    assert encode.outcome == "hit"


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": TEXTS[1]},
        {"prompt": [TEXTS[0]]},
        {"prompt": [TEXTS[0], TEXTS[1]]},
        {"negative_prompt": TEXTS[3]},
        {"guided": False},
        {"negative_prompt_embeds": torch.ones(1, LENGTH, 16)},
        {"negative_prompt_embeds": torch.ones(1, LENGTH, 16).double()},
    ],
)
def test_another_argument_misses(pipe, cache, change):
    encode = Encode(pipe, cache)
    encode()
    encode(**change)
    encode(**change)
    assert encode.outcomes == ["miss", "miss", "hit"]


def test_the_denoiser_and_its_guidance_do_not_matter(pipe, cache):
    encode = Encode(pipe, cache)
    encode()
    pipe._guidance_scale = 3.0
    pipe.unet.requires_grad_(False).conv_in.weight.add_(1.0)
    encode()
    assert encode.outcome == "hit"


def test_an_edit_of_what_came_out_stays_outside(pipe, cache):
    encode = Encode(pipe, cache)
    for result in (encode(), encode()):
        for tensor in result:
            tensor.data.zero_()
    encode()
    assert encode.outcomes == ["miss", "hit", "hit"]


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("second", [torch.inference_mode, torch.no_grad])
def test_modes_of_torch_mix(pipe, cache, first, second):
    encode = cached_encode_prompt(pipe, cache)
    with first():
        made = encode(TEXTS[0], "cpu", 1, True)
    with second():
        kept = encode(TEXTS[0], "cpu", 1, True)
        kept[0].add_(0.0)
    same(made, kept)
    assert cache.summary()["hits"] == 1
    assert kept[0].is_inference() == (second is torch.inference_mode)


def test_a_call_that_records_gradients_goes_to_the_encoder(pipe, cache):
    embeds, _ = cached_encode_prompt(pipe, cache)(TEXTS[0], "cpu", 1, True)
    assert embeds.requires_grad
    assert cache.summary()["bypassed"] == {"gradients of text_encoder are recorded; call under torch.no_grad()": 1}


def test_an_argument_of_unknown_content_goes_to_the_encoder(pipe, cache):
    class Loud(str):
        pass

    class Pipe:
        text_encoder, tokenizer = pipe.text_encoder, pipe.tokenizer

        def encode_prompt(self, prompt, style=None):
            return (torch.ones(1),)

    encode = cached_encode_prompt(Pipe(), cache)
    encode("a", style=object())
    encode(Loud("a"))
    assert cache.summary()["bypassed"] == {
        "argument style holds a object, whose content is unknown": 1,
        "argument prompt holds a Loud, whose content is unknown": 1,
    }


def test_wrong_arguments_get_the_pipelines_own_error(pipe, cache):
    encode = cached_encode_prompt(pipe, cache)
    with pytest.raises(TypeError, match="required"), torch.no_grad():
        encode(TEXTS[0])
    with pytest.raises(TypeError, match="same type"), torch.no_grad():
        encode(TEXTS[0], "cpu", 1, True, negative_prompt=[TEXTS[1]])
    assert cache.summary()["entries"] == 0


def test_the_lora_scale_left_for_the_denoiser_is_set_on_a_hit(cache):
    class Pipe:
        lora_scale = property(lambda self: self._lora_scale)

        def encode_prompt(self, prompt, lora_scale=None):
            self._lora_scale = lora_scale
            return (torch.full((2,), lora_scale),)

    pipe = Pipe()
    encode = cached_encode_prompt(pipe, cache)
    encode("a", lora_scale=0.5)
    encode("a", lora_scale=1.0)
    encode("a", lora_scale=0.5)
    assert cache.summary()["hits"] == 1 and pipe.lora_scale == 0.5


SIZE = LENGTH * 16 * 4  # bytes of one embedding without guidance


def fill(pipe, cache, *numbers):
    """Encode texts by number; the numbers that were hits."""
    outcomes = []
    encode = cached_encode_prompt(pipe, cache, outcomes.append)
    with torch.no_grad():
        for number in numbers:
            encode(TEXTS[number], "cpu", 1, False)
    return [number for number, outcome in zip(numbers, outcomes, strict=True) if outcome == "hit"]


def test_the_limit_holds_and_the_least_recently_used_goes_first(pipe):
    cache = PromptCache(3 * SIZE)
    assert fill(pipe, cache, 0, 1, 2, 0) == [0]
    fill(pipe, cache, 3)
    assert cache.summary()["bytes"] == 3 * SIZE and cache.summary()["evicted"] == 1
    assert fill(pipe, cache, 0, 2, 3, 1) == [0, 2, 3]


def test_an_entry_larger_than_the_limit_is_not_kept(pipe):
    cache = PromptCache(SIZE - 1)
    assert fill(pipe, cache, 0, 0) == []
    assert cache.summary()["too_large"] == 2 and cache.summary()["bytes"] == 0


def test_clear_drops_entries(pipe, cache):
    fill(pipe, cache, 0)
    cache.clear()
    assert fill(pipe, cache, 0) == [] and cache.summary()["bytes"] == SIZE


@pytest.mark.parametrize("limit", [-1, 1.5, None, True])
def test_a_limit_that_is_no_number_of_bytes_is_refused(limit):
    with pytest.raises(ArgumentError, match="limit_bytes"):
        PromptCache(limit)


def test_eight_threads_get_the_bits_of_one(pipe):
    cache = PromptCache(2 * SIZE)  # half of what they ask for, so that entries come and go
    with torch.no_grad():
        expected = [pipe.encode_prompt(text, "cpu", 1, False) for text in TEXTS]
    encode, failed = cached_encode_prompt(pipe, cache), []

    @torch.no_grad()
    def work(start):
        for i in range(20):
            number = (start + i) % len(TEXTS)
            result = encode(TEXTS[number], "cpu", 1, False)
            if not torch.equal(result[0], expected[number][0]):
                failed.append(number)
            result[0].zero_()

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    summary = cache.summary()
    assert failed == [] and summary["hits"] + summary["misses"] == 8 * 20
    assert summary["bytes"] == summary["entries"] * SIZE <= 2 * SIZE


def test_a_stand_in_of_the_pipeline_uses_the_cache_and_the_pipeline_does_not(pipe, cache):
    stand_in = view(pipe, encode_prompt=cached_encode_prompt(pipe, cache))
    arguments = {"num_inference_steps": 2, "output_type": "latent", "height": 8, "width": 8}
    pipe.set_progress_bar_config(disable=True)
    pictures = [
        each(TEXTS[0], generator=torch.Generator().manual_seed(0), **arguments).images
        for each in (pipe, stand_in, stand_in, pipe)
    ]
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    assert (cache.summary()["misses"], cache.summary()["hits"]) == (1, 1)


def test_three_text_encoders_of_sd3(cache):
    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline(
        transformer=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=CLIPTextModelWithProjection(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()).eval(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )
    encode = cached_encode_prompt(pipe, cache)
    with torch.no_grad():
        first = encode(TEXTS[0], None, None, device="cpu", max_sequence_length=8)
        same(first, encode(TEXTS[0], None, None, device="cpu", max_sequence_length=8))
        same(first, pipe.encode_prompt(TEXTS[0], None, None, device="cpu", max_sequence_length=8))
        pipe.text_encoder_3.encoder.final_layer_norm.weight.mul_(2.0)
        assert not torch.equal(first[0], encode(TEXTS[0], None, None, device="cpu", max_sequence_length=8)[0])
    assert (cache.summary()["hits"], cache.summary()["misses"]) == (1, 2)


def test_the_attention_mask_of_pixart_comes_along(cache):
    torch.manual_seed(0)
    pipe = PixArtAlphaPipeline(t5_tokenizer(), t5_encoder(), vae=None, transformer=None, scheduler=DDIMScheduler())
    encode = cached_encode_prompt(pipe, cache)
    with torch.no_grad():
        results = [f(TEXTS[0], device="cpu", max_sequence_length=8) for f in (encode, encode, pipe.encode_prompt)]
    same(results[0], results[1])
    same(results[0], results[2])
    assert cache.summary()["hits"] == 1 and results[1][1].dtype == torch.int64


def test_the_examples_of_the_page_run(pipe, capsys):
    page = (Path(__file__).resolve().parents[3] / "docs" / "text_and_vae.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    pipe.set_progress_bar_config(disable=True)
    names = {"pipe": pipe, "torch": torch}
    for example in examples:
        exec(example, names)
    assert len(examples) == 3 and "psnr_db" in capsys.readouterr().out and names["peak"].added >= 0
