"""Stand-ins for big checkpoints: the same pipelines of `diffusers` with few, random weights, built in a second.

The examples use them unless they are given `--model`, so that they run anywhere. Their pictures are noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

WIDTH, TOKENS = 16, 6  # of a text embedding


def options(description: str) -> argparse.Namespace:
    """The command line that the examples share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="a diffusers folder or hub name; default: a tiny stand-in with random weights")
    parser.add_argument("--prompt", default="a lighthouse in a storm, oil on canvas")
    parser.add_argument("--out", default="picture.png", help="PNG to write")
    return parser.parse_args()


def open_pipeline(args: argparse.Namespace, stand_in: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """(pipeline, arguments of its call): a real one with a prompt, or the stand-in with numbers in a prompt's place."""
    if args.model is not None:
        pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16, use_safetensors=True)
        return pipe.to("cuda" if torch.cuda.is_available() else "cpu"), {"prompt": args.prompt}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = stand_in()
        text = {"prompt_embeds": torch.randn(1, TOKENS, WIDTH), "pooled_prompt_embeds": torch.randn(1, WIDTH)}
    if isinstance(pipe, StableDiffusion3Pipeline):
        text |= {f"negative_{name}": torch.zeros_like(value) for name, value in text.items()}
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**text, "height": 32, "width": 32}


def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 with two joint blocks."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=16,
    )
    texts = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer=transformer.eval(), vae=_vae(16), scheduler=scheduler, **texts)


def flux() -> FluxPipeline:
    """FLUX.1-dev with one joint and one single block."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    texts = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(transformer=transformer.eval(), vae=_vae(4), scheduler=scheduler, **texts)


def _vae(channels: int) -> AutoencoderKL:
    """A VAE that halves each edge."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        scaling_factor=1.5,
        shift_factor=0.1,
    ).eval()
