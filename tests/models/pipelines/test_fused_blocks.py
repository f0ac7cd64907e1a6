"""Ways of calling foreign blocks that the tiny pipelines do not take: fused equals eager to rounding."""

import pytest
import torch
from tests.models.pipelines.tiny import randomise

from vivace.kernels.spec import error_of
from vivace.models.pipelines.fused import fuse

B, N, M, D = 2, 6, 4, 16  # pictures, tokens, text tokens, width


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def built(home, name, *args, **kwargs):
    """A block of diffusers in which every parameter matters."""
    from importlib import import_module

    torch.manual_seed(0)
    return randomise(getattr(import_module(f"diffusers.models.{home}"), name)(*args, **kwargs))


def agree(block, *args, **kwargs):
    """Fused and eager results agree, and the block's own forward took no part in the fused one; returns the report."""
    stand_in, report = fuse(block, backend="reference")
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        plain = block(*args, **kwargs)
        patch.delattr(type(block), "forward")
        ours = stand_in(*args, **kwargs)
    pairs = zip(ours, plain, strict=True) if isinstance(plain, tuple) else [(ours, plain)]
    assert all(error_of(one, other) < 2e-6 for one, other in pairs if other is not None)
    return report


BASIC = {
    "DiT": {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 5},
    "DiT with cross-attention": {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 5, "cross_attention_dim": 8},
    "PixArt": {"norm_type": "ada_norm_single", "cross_attention_dim": 8},
    "Latte": {"norm_type": "ada_norm_single"},
    "UNet": {"cross_attention_dim": 8},
    "UNet, two self-attentions": {"double_self_attention": True},
    "UNet, cross-attention only": {"only_cross_attention": True, "cross_attention_dim": 8},
    "no cross-attention": {},
}


@pytest.mark.parametrize("name", BASIC)
def test_basic_blocks_of_every_kind(name):
    options = BASIC[name]
    block = built("attention", "BasicTransformerBlock", D, 2, 8, **options)
    given = {"timestep": noise(B, 6 * D) if "single" in str(options) else torch.tensor([3, 700])}
    if "cross_attention_dim" in options:
        given |= {"encoder_hidden_states": noise(B, M, 8), "encoder_attention_mask": torch.zeros(B, 1, M)}
    if options.get("double_self_attention"):
        given.pop("timestep")
    report = agree(block, noise(B, N, D), class_labels=torch.tensor([1, 5]), **given)
    steps = 2 if block.attn2 is not None and "single" not in str(options) else 1
    assert report.places("adaln_modulate") == steps and not report.left


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_wan_blocks_with_a_time_per_picture_or_per_token(normed, per_token):
    block = built("transformers.transformer_wan", "WanTransformerBlock", D, 32, 2, cross_attn_norm=normed)
    temb = noise(B, N, 6, D) if per_token else noise(B, 6, D)
    angles = noise(1, N, 1, 4).repeat_interleave(2, dim=-1)
    report = agree(block, noise(B, N, D), noise(B, M, D), temb, (angles.cos(), angles.sin()))
    assert report.places("adaln_modulate") == 1 + normed and report.places("gated_residual") == 2 - normed


def test_wan_blocks_with_keys_of_an_image_prompt_keep_that_attention():
    block = built("transformers.transformer_wan", "WanTransformerBlock", D, 32, 2, added_kv_proj_dim=D)
    angles = noise(1, N, 1, 4).repeat_interleave(2, dim=-1)
    report = agree(block, noise(B, N, D), noise(B, 512 + 3, D), noise(B, 6, D), (angles.cos(), angles.sin()))
    assert [(piece.name, piece.reason) for piece in report.left] == [("attn2", "keys of an image prompt")]


@pytest.mark.parametrize("tokens", [1, N])
def test_ltx_blocks_with_a_time_per_picture_or_per_token(tokens):
    block = built("transformers.transformer_ltx", "LTXVideoTransformerBlock", D, 2, 8, D)
    angles = noise(B, N, 8).repeat_interleave(2, dim=-1)
    mask = torch.tensor([[0.0] * M, [0.0] * (M - 1) + [-10000.0]])[:, None]
    agree(block, noise(B, N, D), noise(B, M, D), noise(B, tokens, 6 * D), (angles.cos(), angles.sin()), mask)


def test_qwen_blocks_with_two_conditionings_and_a_mask():
    block = built("transformers.transformer_qwenimage", "QwenImageTransformerBlock", D, 2, 8, zero_cond_t=True)
    image, text = (torch.polar(torch.ones(n, 4), noise(n, 4)) for n in (N, M))
    mask = torch.tensor([[True] * M, [True] * (M - 1) + [False]])
    index = torch.tensor([[0, 0, 1, 1, 0, 1]] * B)
    agree(block, noise(B, N, D), noise(B, M, D), mask, noise(2 * B, D), (image, text), None, index)


@pytest.mark.parametrize("rotated", [True, False])
def test_flux_blocks_with_and_without_rotation(rotated):
    double = built("transformers.transformer_flux", "FluxTransformerBlock", D, 2, 8)
    single = built("transformers.transformer_flux", "FluxSingleTransformerBlock", D, 2, 8)
    angles = noise(M + N, 4).repeat_interleave(2, dim=-1)
    for block in (double, single):
        report = agree(
            block, noise(B, N, D), noise(B, M, D), noise(B, D), (angles.cos(), angles.sin()) if rotated else None
        )
        assert not report.left


def test_flux_blocks_add_what_an_image_prompt_adapter_returns():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    block = built("transformers.transformer_flux", "FluxTransformerBlock", D, 2, 8)
    block.attn.set_processor(FluxIPAdapterAttnProcessor(D, 8).eval())
    given = {"ip_hidden_states": [noise(B, 4, 8)]}
    report = agree(block, noise(B, N, D), noise(B, M, D), noise(B, D), None, given)
    assert [piece.reason for piece in report.left] == ["attention processor FluxIPAdapterAttnProcessor"]
    assert report.places("adaln_modulate") == 2


def test_fused_projections_of_flux_take_the_plain_processor():
    block = built("transformers.transformer_flux", "FluxTransformerBlock", D, 2, 8)
    block.attn.fuse_projections()
    agree(block, noise(B, N, D), noise(B, M, D), noise(B, D))


@pytest.mark.parametrize("pre_only", [True, False])
def test_sd3_blocks_without_norms_of_queries_have_no_attention_to_fuse(pre_only):
    block = built("attention", "JointTransformerBlock", D, 2, 8, context_pre_only=pre_only)
    report = agree(block, noise(B, N, D), noise(B, M, D), noise(B, D))
    assert report.places("qk_norm_rope") == 0 and not report.left


def test_hidden_states_of_any_layout_are_taken():
    block = built("attention", "BasicTransformerBlock", D, 2, 8, **BASIC["PixArt"])
    hidden = noise(B, D, N).transpose(1, 2)
    agree(block, hidden, encoder_hidden_states=noise(B, M, 8), timestep=noise(B, 6 * D))
