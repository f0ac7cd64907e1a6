"""Tiny text encoders, tokenizers trained here, and a Stable Diffusion pipeline around them."""

import json

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from vivace.models.pipelines.prompts import cached_encode_prompt

TEXTS = ["a red fox in the snow", "a blue boat on a lake", "photo of a cat", "low quality, blurry"]
LENGTH = 16


def clip_tokenizer():
    """A byte-level BPE as CLIP's, trained here."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    trained = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, end_of_word_suffix="</w>", special_tokens=[start, end], initial_alphabet=alphabet
    )
    trained.train_from_iterator(TEXTS, trainer)
    bpe = json.loads(trained.to_str())["model"]
    return CLIPTokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]], model_max_length=LENGTH)


def t5_tokenizer():
    """A word-piece tokenizer with T5's padding and end tokens, trained here."""
    trained = Tokenizer(models.WordPiece(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"])
    trained.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=LENGTH
    )


def clip_config(width=16):
    return CLIPTextConfig(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=1,
    )


def t5_encoder():
    config = T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def stable_diffusion():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class Encode:
    """encode_prompt with and without the cache, under no_grad as pipelines call it."""

    def __init__(self, pipe, cache):
        self.fresh, self.cached, self.outcomes = pipe.encode_prompt, None, []
        self.cached = cached_encode_prompt(pipe, cache, self.outcomes.append)

    @torch.no_grad()
    def __call__(self, prompt=TEXTS[0], *, guided=True, **more):
        arguments = ("cpu", 1, guided)
        result = self.cached(prompt, *arguments, **more)
        same(result, self.fresh(prompt, *arguments, **more))
        return result

    @property
    def outcome(self):
        return self.outcomes[-1]


def same(a, b):
    """Both hold the same bits in the same dtypes."""
    assert type(a) is type(b) and len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y))
