"""Tiny pipelines with random weights, one per family: every part of a network matters, none takes long.

`make("sd3")` builds one; `FAMILIES["sd3"].arguments(dtype)` are the arguments of its call, prompt embeddings included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

STEPS, TEXT, WIDTH = 4, 6, 16  # steps of a call, text tokens, width of a prompt embedding


@dataclass(frozen=True)
class Tiny:
    """A family: how to build it and how to call it.

    call: arguments of `pipe(**call)`; guided: whether they ask for both branches; scale: the argument that is the
    guidance scale; denoisers: the names of the pipeline's networks.
    """

    name: str
    build: Callable[[], Any]
    call: Mapping[str, Any]
    guided: bool = True
    scale: str = "guidance_scale"
    denoisers: tuple[str, ...] = ("transformer",)

    def arguments(self, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
        """A fresh copy of `call` with its tensors as `dtype`, and `changes`."""
        return {name: _as(value, dtype) for name, value in self.call.items()} | changes


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of family or variant `name`, the same weights every time."""
    return _finish({**FAMILIES, **VARIANTS}[name].build(), dtype)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Adds small random values to every parameter that is all zeros or all ones; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if float(parameter.flatten()[0]) in (0.0, 1.0) and bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def embeddings(rows: int, *shape: int, seed: int = 1) -> torch.Tensor:
    """Numbers [rows, *shape] in place of what a text encoder would say."""
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def _as(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return list(value) if isinstance(value, list) else value
    return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()


def _finish(pipe: Any, dtype: torch.dtype) -> Any:
    for index, part in enumerate(pipe.components.values()):
        if isinstance(part, torch.nn.Module):
            randomise(part, index)
    if dtype is not torch.float32:
        pipe.to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _made(name: str, *, seed: int = 0, **config: Any) -> Any:
    """An object of the diffusers class `name`, with weights that depend on the arguments alone."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(diffusers, name)(**config)


def _vae(channels: int = 4, **config: Any) -> Any:
    """A VAE that halves each edge."""
    stages = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16}
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    kinds = {"down_block_types": down, "up_block_types": up, "latent_channels": channels}
    return _made(config.pop("name", "AutoencoderKL"), **(stages | kinds | config))


def _flow(**config: Any) -> Any:
    return _made("FlowMatchEulerDiscreteScheduler", **config)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
SHIFTING = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}


def _dit() -> Any:
    # 1000 classes, because the pipeline's empty class is number 1000
    net = _made("DiTTransformer2DModel", **HEADS, out_channels=8, num_layers=3, sample_size=8, num_embeds_ada_norm=1000)
    return _made("DiTPipeline", transformer=net, vae=_vae(), scheduler=_made("DDIMScheduler", clip_sample=False))


def _pixart() -> Any:
    sizes = {"sample_size": 8, "caption_channels": WIDTH, "cross_attention_dim": 16, "interpolation_scale": 1}
    net = _made("PixArtTransformer2DModel", **HEADS, **sizes, num_layers=3, use_additional_conditions=False)
    scheduler = _made("DPMSolverMultistepScheduler")
    return _made("PixArtAlphaPipeline", **_texts(), transformer=net, vae=_vae(), scheduler=scheduler)


def _sd3() -> Any:
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8, "num_layers": 3}
    text = {"joint_attention_dim": WIDTH, "caption_projection_dim": 16, "pooled_projection_dim": WIDTH}
    net = _made("SD3Transformer2DModel", **HEADS, **sizes, **text, qk_norm="rms_norm", dual_attention_layers=(0,))
    vae = _vae(shift_factor=0.1, scaling_factor=1.5)
    return _made("StableDiffusion3Pipeline", **_texts(3), transformer=net, vae=vae, scheduler=_flow(shift=3.0))


def _flux() -> Any:
    text = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH, "guidance_embeds": True}
    net = _made("FluxTransformer2DModel", **_joint(16), **text, axes_dims_rope=(2, 2, 4))
    vae = _vae(shift_factor=0.1, scaling_factor=1.5)
    return _made("FluxPipeline", **_texts(2), transformer=net, vae=vae, scheduler=_flow(**SHIFTING))


def _unet(**config: Any) -> Any:
    stages = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 2, "sample_size": 8}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    kinds = {"down_block_types": down, "up_block_types": up, "cross_attention_dim": WIDTH, "attention_head_dim": 2}
    return _made("UNet2DConditionModel", **(stages | kinds | config))


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _sd15() -> Any:
    scheduler = _made("PNDMScheduler", **NOISE, skip_prk_steps=True)
    return _made("StableDiffusionPipeline", **_texts(), **UNCHECKED, unet=_unet(), vae=_vae(), scheduler=scheduler)


def _sdxl() -> Any:
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    net = _unet(**extra, projection_class_embeddings_input_dim=6 * 8 + WIDTH, transformer_layers_per_block=(1, 2))
    scheduler = _made("EulerDiscreteScheduler", **NOISE)
    parts = {"unet": net, "vae": _vae(), "scheduler": scheduler, "add_watermarker": False}
    return _made("StableDiffusionXLPipeline", **_texts(2), **parts)


def _joint(channels: int) -> dict[str, Any]:
    """Two blocks with two streams, then two with one."""
    return {**HEADS, "in_channels": channels, "num_layers": 2, "num_single_layers": 2}


def _texts(encoders: int = 1) -> dict[str, None]:
    """Absent text encoders and tokenizers."""
    names = [f"{part}{n}" for n in ("", "_2", "_3")[:encoders] for part in ("text_encoder", "tokenizer")]
    return dict.fromkeys(names)


def _flux2() -> Any:
    text = {"joint_attention_dim": WIDTH, "timestep_guidance_channels": 16}
    net = _made("Flux2Transformer2DModel", **_joint(16), **text, axes_dims_rope=(2, 2, 2, 2))
    vae = _vae(name="AutoencoderKLFlux2", decoder_block_out_channels=(8, 8))
    return _made("Flux2Pipeline", **_texts(), transformer=net, vae=vae, scheduler=_flow(**SHIFTING))


def _qwen() -> Any:
    sizes = {"in_channels": 16, "out_channels": 4, "num_layers": 3, "joint_attention_dim": WIDTH}
    net = _made("QwenImageTransformer2DModel", **HEADS, **sizes, axes_dims_rope=(2, 2, 4))
    vae = _made("AutoencoderKLQwenImage", **_causal())
    return _made("QwenImagePipeline", **_texts(), transformer=net, vae=vae, scheduler=_flow(**SHIFTING))


def _causal() -> dict[str, Any]:
    """A causal video VAE: half of every edge, every second frame."""
    shape = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
    return shape | {"latents_mean": [0.1] * 4, "latents_std": [1.5] * 4}


def _lumina2() -> Any:
    sizes = {"sample_size": 8, "in_channels": 4, "hidden_size": 16, "num_layers": 3, "num_refiner_layers": 2}
    heads = {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "cap_feat_dim": WIDTH}
    net = _made("Lumina2Transformer2DModel", **sizes, **heads, axes_dim_rope=(4, 2, 2), axes_lens=(32, 16, 16))
    vae = _vae(shift_factor=0.1, scaling_factor=1.5)
    return _made("Lumina2Pipeline", **_texts(), transformer=net, vae=vae, scheduler=_flow(**SHIFTING))


def _sana() -> Any:
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "sample_size": 8, "caption_channels": WIDTH}
    net = _made("SanaTransformer2DModel", **HEADS, **cross, **sizes)
    stages = {"latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 0.5}
    for half in ("encoder", "decoder"):
        stages |= {f"{half}_block_out_channels": (4, 8, 8), f"{half}_layers_per_block": (1,) * 3}
        stages |= {f"{half}_qkv_multiscales": ((),) * 3}
    vae = _made("AutoencoderDC", **stages)
    scheduler = _made("DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True)
    return _made("SanaPipeline", **_texts(), transformer=net, vae=vae, scheduler=scheduler)


def _hunyuan_dit() -> Any:
    sizes = {"in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "num_layers": 6}
    text = {"cross_attention_dim": WIDTH, "cross_attention_dim_t5": WIDTH, "pooled_projection_dim": WIDTH}
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "text_len": TEXT, "text_len_t5": TEXT}
    net = _made("HunyuanDiT2DModel", **sizes, **text, **heads)
    scheduler = _made("DDPMScheduler", beta_schedule="scaled_linear", prediction_type="v_prediction")
    return _made("HunyuanDiTPipeline", **_texts(2), **UNCHECKED, transformer=net, vae=_vae(), scheduler=scheduler)


def _cogvideox() -> Any:
    sizes = {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": WIDTH, "num_layers": 3}
    grid = {"sample_width": 8, "sample_height": 8, "sample_frames": 3, "temporal_compression_ratio": 2}
    net = _made("CogVideoXTransformer3DModel", **HEADS, **sizes, **grid, max_text_seq_length=TEXT)
    down, up = ("CogVideoXDownBlock3D",) * 2, ("CogVideoXUpBlock3D",) * 2
    stages = {"block_out_channels": (8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    vae = _made(
        "AutoencoderKLCogVideoX", **stages, down_block_types=down, up_block_types=up, temporal_compression_ratio=2
    )
    noise = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = _made("CogVideoXDDIMScheduler", **noise, timestep_spacing="trailing", clip_sample=False)
    return _made("CogVideoXPipeline", **_texts(), transformer=net, vae=vae, scheduler=scheduler)


def _wan_net(seed: int = 0) -> Any:
    sizes = {"in_channels": 4, "out_channels": 4, "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3}
    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "rope_max_seq_len": 32}
    return _made("WanTransformer3DModel", seed=seed, **heads, **sizes)


def _wan(**parts: Any) -> Any:
    vae = _made("AutoencoderKLWan", **_causal(), scale_factor_temporal=2, scale_factor_spatial=2)
    scheduler = _made(
        "UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return _made("WanPipeline", **_texts(), transformer=_wan_net(), vae=vae, scheduler=scheduler, **parts)


def _wan22() -> Any:
    return _wan(transformer_2=_wan_net(1), boundary_ratio=0.75)


def _ltx() -> Any:
    sizes = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": WIDTH}
    net = _made("LTXVideoTransformer3DModel", **HEADS, **sizes, num_layers=3)
    stages = {"latent_channels": 8, "block_out_channels": (8, 8), "layers_per_block": (1, 1, 1)}
    stages |= {"decoder_block_out_channels": (8, 8), "decoder_layers_per_block": (1, 1, 1)}
    stages |= {"spatio_temporal_scaling": (True, False), "decoder_spatio_temporal_scaling": (True, False)}
    stages |= {"down_block_types": ("LTXVideoDownBlock3D",) * 2, "decoder_inject_noise": (False,) * 3}
    stages |= {"upsample_residual": (False,) * 2, "upsample_factor": (1,) * 2, "downsample_type": ("conv",) * 2}
    vae = _made("AutoencoderKLLTXVideo", **stages)
    return _made("LTXPipeline", **_texts(), transformer=net, vae=vae, scheduler=_flow(**SHIFTING))


def _hunyuan_video() -> Any:
    text = {"text_embed_dim": WIDTH, "pooled_projection_dim": WIDTH, "num_refiner_layers": 1}
    net = _made("HunyuanVideoTransformer3DModel", **_joint(4), **text, out_channels=4, rope_axes_dim=(2, 2, 4))
    stages = {"block_out_channels": (4,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    vae = _made("AutoencoderKLHunyuanVideo", **stages)
    return _made("HunyuanVideoPipeline", **_texts(2), transformer=net, vae=vae, scheduler=_flow(shift=7.0))


def _prompts(guided: bool = True, masks: str = "", pooled: str = "") -> dict[str, Any]:
    """Prompt embeddings with names as most pipelines have them; `masks`, `pooled`: the names of further arguments."""
    call: dict[str, Any] = {}
    for seed, sign in enumerate(("", "negative_") if guided else ("",)):
        call[f"{sign}prompt_embeds"] = embeddings(1, TEXT, WIDTH, seed=seed)
        if masks:
            call[f"{sign}{masks}"] = torch.ones(1, TEXT, dtype=torch.long)
        if pooled:
            call[f"{sign}{pooled}"] = embeddings(1, WIDTH, seed=seed + 7)
    return call


def _hunyuan_dit_prompts() -> dict[str, Any]:
    first = _prompts(masks="prompt_attention_mask")
    return first | {f"{name}_2": value.flip(1) for name, value in first.items()}


IMAGE: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "latent"}
VIDEO: dict[str, Any] = {**IMAGE, "num_frames": 3}
MASK, POOLED, UNET = "prompt_attention_mask", "pooled_prompt_embeds", ("unet",)
FREE = {"use_resolution_binning": False}  # sizes as they are asked for
PIXART = {**FREE, "negative_prompt": None, "clean_caption": False}
SANA = {**FREE, "negative_prompt": None}
LUMINA = {"height": 64, "width": 64, "cfg_normalization": False}  # its pipeline takes any VAE to divide edges by 8
LARGE = {"height": 32, "width": 32}  # for a VAE that divides edges by 4 or more
LONG = {"height": 64, "width": 64, "num_frames": 5}
DIT = {"class_labels": [1], "num_inference_steps": STEPS, "output_type": "np", "guidance_scale": 3.0}
EXPERTS = ("transformer", "transformer_2")


def _tiny(name: str, build: Callable[[], Any], *calls: Mapping[str, Any], **fields: Any) -> tuple[str, Tiny]:
    call = {key: value for part in calls for key, value in part.items()}
    return name, Tiny(name, build, MappingProxyType(call), **fields)


def _guided(scale: float, name: str = "guidance_scale") -> dict[str, float]:
    return {name: scale}


TRUE = "true_cfg_scale"
FAMILIES: dict[str, Tiny] = dict(
    (
        _tiny("dit", _dit, DIT),
        _tiny("pixart", _pixart, _prompts(masks=MASK), IMAGE, PIXART, _guided(4.5)),
        _tiny("sd3", _sd3, _prompts(pooled=POOLED), IMAGE, _guided(5.0)),
        _tiny("flux", _flux, _prompts(False, pooled=POOLED), IMAGE, _guided(3.5), guided=False),
        _tiny("sd15", _sd15, _prompts(), IMAGE, _guided(7.5), denoisers=UNET),
        _tiny("sdxl", _sdxl, _prompts(pooled=POOLED), IMAGE, _guided(5.0), denoisers=UNET),
        _tiny("flux_true_cfg", _flux, _prompts(pooled=POOLED), IMAGE, _guided(2.0, TRUE), scale=TRUE),
        _tiny("flux2", _flux2, _prompts(False), IMAGE, _guided(4.0), guided=False),
        _tiny("qwen", _qwen, _prompts(masks="prompt_embeds_mask"), IMAGE, _guided(4.0, TRUE), scale=TRUE),
        _tiny("lumina2", _lumina2, _prompts(masks=MASK), IMAGE, LUMINA, _guided(4.0)),
        _tiny("sana", _sana, _prompts(masks=MASK), IMAGE, LARGE, SANA, _guided(4.5)),
        _tiny("hunyuan_dit", _hunyuan_dit, _hunyuan_dit_prompts(), IMAGE, FREE, _guided(5.0)),
        _tiny("cogvideox", _cogvideox, _prompts(), VIDEO, _guided(6.0)),
        _tiny("wan", _wan, _prompts(), VIDEO, _guided(5.0)),
        _tiny("wan22", _wan22, _prompts(), VIDEO, _guided(4.0), {"guidance_scale_2": 3.0}, denoisers=EXPERTS),
        _tiny("ltx", _ltx, _prompts(masks=MASK), VIDEO, LARGE, _guided(3.0)),
        _tiny("hunyuan_video", _hunyuan_video, _prompts(False, MASK, POOLED), VIDEO, LONG, _guided(6.0), guided=False),
    )
)


def picture(channels: int = 3, edge: int = 16) -> torch.Tensor:
    """An image [1, channels, edge, edge] in [0, 1]."""
    return torch.rand(1, channels, edge, edge, generator=torch.Generator().manual_seed(5))


def mask(edge: int = 16) -> torch.Tensor:
    """A mask [1, 1, edge, edge]: the right half is to be painted."""
    return (torch.arange(edge) >= edge // 2).float().expand(1, 1, edge, edge).clone()


def _around(name: str, base: str, **parts: Any) -> Callable[..., Any]:
    """A builder of the pipeline class `name` around the networks of family `base`, or of the pipeline it is given."""

    def build(pipe: Any = None) -> Any:
        pipe = make(base) if pipe is None else pipe
        made = {key: value() for key, value in parts.items()}
        allowed = {"requires_safety_checker": False} if "safety_checker" in pipe.components else {}
        around = _made(name, **pipe.components, **allowed, **made)
        around.set_progress_bar_config(disable=True)
        return around

    return build


def _controlnet() -> Any:
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": WIDTH}
    stages = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 2, "attention_head_dim": 2}
    return randomise(_made("ControlNetModel", **kinds, **stages, conditioning_embedding_out_channels=(4, 8)), 9)


controlnet_sd = _around("StableDiffusionControlNetPipeline", "sd15", controlnet=_controlnet)
img2img_sd = _around("StableDiffusionImg2ImgPipeline", "sd15")
inpaint_sd = _around("StableDiffusionInpaintPipeline", "sd15")
sd3_img2img = _around("StableDiffusion3Img2ImgPipeline", "sd3")
flux_img2img = _around("FluxImg2ImgPipeline", "flux")
flux_inpaint = _around("FluxInpaintPipeline", "flux")

FROM_PICTURE = {"image": picture(), "strength": 0.5}
PAINTED = {**FROM_PICTURE, "mask_image": mask()}
SIZELESS = {"num_inference_steps": STEPS, "output_type": "latent"}
VARIANTS: dict[str, Tiny] = dict(
    (
        _tiny("controlnet_sd", controlnet_sd, FAMILIES["sd15"].call, {"image": picture()}, denoisers=UNET),
        _tiny("img2img_sd", img2img_sd, _prompts(), SIZELESS, FROM_PICTURE, _guided(7.5), denoisers=UNET),
        _tiny("inpaint_sd", inpaint_sd, FAMILIES["sd15"].call, PAINTED, denoisers=UNET),
        _tiny("sd3_img2img", sd3_img2img, FAMILIES["sd3"].call, FROM_PICTURE),
        _tiny("flux_img2img", flux_img2img, FAMILIES["flux"].call, FROM_PICTURE, guided=False),
        _tiny("flux_inpaint", flux_inpaint, FAMILIES["flux"].call, PAINTED, guided=False),
    )
)
