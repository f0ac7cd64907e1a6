"""Blocks of networks as their other checkpoints configure them, and with what pipelines add to a call."""

import copy
import dataclasses

import diffusers
import pytest
import torch
from tests.models.pipelines.checks import Network, networks, observes_every_block, replaces_every_block, tensor
from tests.models.pipelines.tiny import FAMILIES, HEADS, TEXT, WIDTH, embeddings, make, randomise

TIME = torch.tensor([3.0])
CAPTION = embeddings(1, TEXT, WIDTH)
MASK = torch.ones(1, TEXT, dtype=torch.long)
GRID = {"axes_dims_rope": (2, 2, 4)}


def rotary(tokens, width=8):
    return torch.ones(tokens, width), torch.zeros(tokens, width)


def pixart_sigma_with_sizes():
    sizes = {"sample_size": 8, "caption_channels": WIDTH, "cross_attention_dim": 24, "interpolation_scale": 1}
    heads = {"num_attention_heads": 2, "attention_head_dim": 12}
    module = diffusers.PixArtTransformer2DModel(**heads, **sizes, num_layers=2, use_additional_conditions=True)
    extra = {"resolution": torch.tensor([[16.0, 16.0]]), "aspect_ratio": torch.tensor([[1.0]])}
    return module, (embeddings(1, 4, 8, 8), CAPTION, TIME, extra), {"encoder_attention_mask": MASK}


def cogvideox_with_frames_in_patches():
    sizes = {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": WIDTH, "num_layers": 2}
    grid = {"sample_width": 8, "sample_height": 8, "patch_size_t": 2, "max_text_seq_length": TEXT, "patch_bias": False}
    module = diffusers.CogVideoXTransformer3DModel(
        **HEADS, **sizes, **grid, ofs_embed_dim=8, use_rotary_positional_embeddings=True
    )
    latent = embeddings(1, 2, 4, 8, 8)
    return module, (latent, CAPTION, TIME), {"image_rotary_emb": rotary(16), "ofs": torch.tensor([2.0])}


def wan_with_a_time_for_each_token():
    sizes = {"in_channels": 4, "out_channels": 4, "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    module = diffusers.WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, **sizes)
    return module, (embeddings(1, 4, 2, 8, 8), TIME.expand(1, 32), CAPTION), {}


def wan_from_a_picture():
    sizes = {"in_channels": 8, "out_channels": 4, "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    picture = {"image_dim": 8, "added_kv_proj_dim": 24}
    module = diffusers.WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, **sizes, **picture)
    return module, (embeddings(1, 8, 2, 8, 8), TIME, embeddings(1, 512, WIDTH), embeddings(1, 5, 8)), {}


def hunyuan_video_with_replaced_tokens():
    text = {"text_embed_dim": WIDTH, "pooled_projection_dim": WIDTH, "num_refiner_layers": 1, "guidance_embeds": False}
    layers = {"num_layers": 1, "num_single_layers": 2, "in_channels": 4, "out_channels": 4, "rope_axes_dim": (2, 2, 4)}
    module = diffusers.HunyuanVideoTransformer3DModel(**HEADS, **text, **layers, image_condition_type="token_replace")
    return module, (embeddings(1, 4, 2, 8, 8), TIME, CAPTION, MASK, embeddings(1, WIDTH)), {}


def qwen_with_reference_pictures():
    sizes = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": WIDTH}
    module = diffusers.QwenImageTransformer2DModel(**HEADS, **sizes, **GRID, zero_cond_t=True)
    call = {"hidden_states": embeddings(1, 32, 16), "encoder_hidden_states": CAPTION, "timestep": TIME}
    shapes = {"img_shapes": [[(1, 4, 4), (1, 4, 4)]], "encoder_hidden_states_mask": MASK}
    return module, (), call | shapes | {"controlnet_block_samples": [embeddings(1, 32, 16)]}


def flux2_that_keeps_reference_pictures():
    text = {"joint_attention_dim": WIDTH, "timestep_guidance_channels": 16, "num_layers": 1, "num_single_layers": 2}
    module = diffusers.Flux2Transformer2DModel(**HEADS, **text, in_channels=16, axes_dims_rope=(2, 2, 2, 2))
    ids = {"img_ids": torch.ones(24, 4), "txt_ids": torch.zeros(TEXT, 4), "guidance": TIME}
    call = {"hidden_states": embeddings(1, 24, 16), "encoder_hidden_states": CAPTION, "timestep": TIME, **ids}
    return module, (), call | {"kv_cache_mode": "extract", "num_ref_tokens": 8}


def sd3_with_controls():
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8, "num_layers": 3}
    text = {"joint_attention_dim": WIDTH, "caption_projection_dim": 16, "pooled_projection_dim": WIDTH}
    module = diffusers.SD3Transformer2DModel(**HEADS, **sizes, **text)
    controls = {"block_controlnet_hidden_states": [embeddings(1, 16, 16)]}
    return module, (embeddings(1, 4, 8, 8), CAPTION, embeddings(1, WIDTH), TIME), controls


def unet_with_adapters():
    stages = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": WIDTH}
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    kinds |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    module = diffusers.UNet2DConditionModel(**stages, **kinds, attention_head_dim=2)
    module.up_blocks[0].s1, module.up_blocks[0].s2, module.up_blocks[0].b1, module.up_blocks[0].b2 = 0.9, 0.2, 1.2, 1.4
    residuals = [embeddings(1, 8, 8, 8), embeddings(1, 16, 4, 4)]
    return module, (embeddings(1, 4, 8, 8), TIME, CAPTION), {"down_intrablock_additional_residuals": residuals}


def unet_without_text():
    stages = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "mid_block_type": None}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return diffusers.UNet2DConditionModel(**stages, **kinds), (embeddings(1, 4, 8, 8), TIME, None), {}


CONFIGURATIONS = (
    pixart_sigma_with_sizes,
    cogvideox_with_frames_in_patches,
    wan_with_a_time_for_each_token,
    wan_from_a_picture,
    hunyuan_video_with_replaced_tokens,
    qwen_with_reference_pictures,
    flux2_that_keeps_reference_pictures,
    sd3_with_controls,
    unet_with_adapters,
)


def network(build):
    torch.manual_seed(0)
    module, args, kwargs = build()
    randomise(module)
    with torch.no_grad():
        return Network(module, args, kwargs, tensor(module(*args, **copy.deepcopy(kwargs))))


@pytest.mark.parametrize("build", CONFIGURATIONS)
def test_blocks_of_another_configuration(build):
    made = network(build)
    observes_every_block(made)
    replaces_every_block(made)


def test_unet_without_text_or_middle_has_blocks_all_the_same():
    made = network(unet_without_text)
    replaces_every_block(made)
    assert [info.kind for info in made.parts.blocks] == ["down", "down", "up", "up"]


def test_reference_tokens_count_as_image_tokens():
    seen = []
    network(flux2_that_keeps_reference_pictures).intercepted(lambda call: (seen.append(call.image), call.compute())[1])
    assert seen == [slice(None), slice(TEXT, None), slice(TEXT, None)]


def test_skipped_layers_have_no_turn():
    first, seen = networks("sd3")[0], []
    skipping = dataclasses.replace(first, kwargs={**first.kwargs, "skip_layers": [1]})
    answer = skipping.intercepted(lambda call: (seen.append(call.info.index), call.compute())[1])
    assert seen == [0, 2]
    assert torch.equal(answer, skipping.run())


def test_blocks_with_lora_weights():
    from peft import LoraConfig

    first = networks("flux")[0]
    module = copy.deepcopy(first.module)
    torch.manual_seed(0)
    module.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    tuned = dataclasses.replace(first, module=module, kwargs={**first.kwargs, "joint_attention_kwargs": {"scale": 0.5}})
    answer = tuned.run()
    assert not torch.equal(answer, first.answer)
    observes_every_block(dataclasses.replace(tuned, answer=answer))


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "sd15", "wan"])
def test_blocks_in_bfloat16(name):
    first = networks(name)[0]

    def narrow(value):
        return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    args, kwargs = tuple(map(narrow, first.args)), {key: narrow(value) for key, value in first.kwargs.items()}
    half = dataclasses.replace(first, module=copy.deepcopy(first.module).bfloat16(), args=args, kwargs=kwargs)
    observes_every_block(dataclasses.replace(half, answer=half.run()))


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_pipeline_is_the_same_every_time_and_heeds_its_guidance(name):
    tiny = FAMILIES[name]

    def picture(**changes):
        return torch.as_tensor(make(name)(**tiny.arguments(**changes), generator=torch.Generator().manual_seed(0))[0])

    first = picture()
    assert first.isfinite().all()
    assert torch.equal(picture(), first)
    assert not torch.equal(picture(**{tiny.scale: 2.5}), first)
