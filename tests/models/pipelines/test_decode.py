"""The stand-in of a VAE decodes as it was told and reports it; the VAE itself never notices."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from tests.models.pipelines.tiny import FAMILIES, make

from vivace.errors import ArgumentError, UnsupportedError
from vivace.metrics.quality import psnr
from vivace.models.pipelines.decode import DecodeOptions, decoder_view, measure_ms

VIDEO = ("qwen", "cogvideox", "wan", "ltx", "hunyuan_video")
VAES = [name for name in FAMILIES if name not in ("flux_true_cfg", "wan22")]  # which share the VAE of another


def latent(vae, edge=12, seed=3, dtype=torch.float32):
    """A latent [1, C, edge, edge], of three frames for a video VAE."""
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    frames = (3,) if any(parameter.dim() == 5 for parameter in vae.parameters()) else ()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, *frames, edge, edge, generator=generator, dtype=torch.float64).to(dtype)


def small_tiles(vae):
    """Tiles of 8 latent pixels, 6 apart, for VAEs that count them by height and width."""
    if hasattr(vae, "tile_sample_min_height"):
        ratio = getattr(vae, "spatial_compression_ratio", 2)
        for side in ("height", "width"):
            setattr(vae, f"tile_sample_min_{side}", 8 * ratio)
            setattr(vae, f"tile_sample_stride_{side}", 6 * ratio)
            if hasattr(vae, f"tile_latent_min_{side}"):
                setattr(vae, f"tile_latent_min_{side}", 8)
    return vae


def state(vae):
    """What must not change: attributes but for tables of torch, children, parameters by identity, version and bits."""
    attributes = {name: value for name, value in vars(vae).items() if not isinstance(value, (dict, torch.Tensor))}
    weights = [(id(p), p.data_ptr(), p._version, p.dtype, p.stride()) for p in vae.parameters()]
    return str(attributes), [id(part) for part in vae.modules()], weights


def decoded(vae, z, *args, **kwargs):
    with torch.no_grad():
        return vae.decode(z, *args, return_dict=False, **kwargs)[0]


def timed(*milliseconds):
    """A clock for decodes that shows these times, in turn."""
    left = list(milliseconds)

    def measure(work, device):
        return left.pop(0), work()

    return measure


def never(work, device):
    raise AssertionError("measured again")


@pytest.fixture
def vae():
    return make("sd15").vae


@pytest.mark.parametrize("name", VAES)
def test_exact_is_the_default_and_keeps_every_bit(name):
    vae = make(name).vae
    z = latent(vae)
    expected = decoded(copy.deepcopy(vae), z)
    before = state(vae)
    stand_in, report = decoder_view(vae, DecodeOptions())
    picture = decoded(stand_in, z)
    assert torch.equal(picture, expected) and picture.stride() == expected.stride()
    assert (report.dtype, report.tiled, report.extra_bytes) == ("float32", False, 0)
    assert report.layout == "contiguous_format" and state(vae) == before


@pytest.mark.parametrize("name", VAES)
def test_tiles_are_those_of_the_vae_itself_which_stays_untiled(name):
    vae = small_tiles(make(name).vae)
    z, tiling = latent(vae), copy.deepcopy(vae)
    tiling.enable_tiling()
    before = state(vae)
    stand_in, report = decoder_view(vae, DecodeOptions(tiled=True))
    picture = decoded(stand_in, z)
    assert torch.equal(picture, decoded(tiling, z)) and not torch.equal(picture, decoded(copy.deepcopy(vae), z))
    assert report.tiled and not vae.use_tiling and state(vae) == before


@pytest.mark.parametrize("name", VAES)
def test_bfloat16_errs_at_most_twice_as_much_as_the_vae_cast_to_it(name):
    vae = make(name).vae
    z = latent(vae)
    exact = decoded(copy.deepcopy(vae).double(), z.double())
    eager = decoded(copy.deepcopy(vae).bfloat16(), z.bfloat16()).float()
    before, options = state(vae), DecodeOptions("bf16")
    stand_in, report = decoder_view(vae, options)
    picture = decoded(stand_in, z)
    assert state(vae) == before and picture.dtype == torch.float32 and picture.is_contiguous()
    assert psnr(picture, exact)[0] >= psnr(eager, exact)[0] - 6.02  # 20 log10(2)
    assert psnr(picture, exact)[0] > 30.0
    assert (report.dtype, report.layout) == ("bfloat16", "channels_last_3d" if z.dim() == 5 else "channels_last")
    decoding = [p for n, p in vae.named_parameters() if not n.startswith(("encoder.", "quant_conv."))]
    buffers = [b for part in vae.children() if part is not vae.encoder for b in part.buffers()]
    floats = sum(t.numel() * 2 for t in (*decoding, *buffers) if t.is_floating_point())
    assert floats <= report.extra_bytes == options.extra_bytes <= floats + 64 * len(buffers)


def test_weights_of_the_copy_lie_channels_last():
    for name, layout in (("sd15", torch.channels_last), ("wan", torch.channels_last_3d)):
        vae, options = make(name).vae, DecodeOptions("bf16")
        decoded(decoder_view(vae, options)[0], latent(vae))
        copies = options._known.record(vae).copies(vae)
        kernels = [p for p in copies["decoder"].parameters() if p.dim() == (4 if name == "sd15" else 5)]
        assert kernels and all(p.is_contiguous(memory_format=layout) and p.dtype == torch.bfloat16 for p in kernels)


def test_both_ways_of_returning_are_kept(vae):
    z = latent(vae)
    for options in (DecodeOptions(), DecodeOptions("bf16")):
        stand_in, _ = decoder_view(vae, options)
        with torch.no_grad():
            whole = stand_in.decode(z)
        assert type(whole) is DecoderOutput and torch.equal(whole.sample, decoded(stand_in, z))
        assert torch.equal(whole["sample"], whole.sample)


def test_the_timestep_of_a_conditioned_decoder_passes_through():
    torch.manual_seed(0)
    base = make("ltx").vae
    vae = type(base).from_config({**base.config, "timestep_conditioning": True}).eval()
    z, timestep = latent(vae), torch.tensor([0.05])
    stand_in, _ = decoder_view(vae, DecodeOptions())
    assert torch.equal(decoded(stand_in, z, timestep), decoded(vae, z, timestep))
    stand_in, _ = decoder_view(vae, DecodeOptions("bf16"))
    assert psnr(decoded(stand_in, z, timestep), decoded(vae, z, timestep))[0] > 30.0


@pytest.mark.parametrize(("exact_ms", "bf16_ms"), [(30.0, 10.0), (10.0, 30.0), (10.0, 10.0)])
def test_auto_takes_the_faster_and_remembers_it(vae, exact_ms, bf16_ms):
    z, options = latent(vae), DecodeOptions("auto")
    expected = {False: decoded(vae, z), True: decoded(decoder_view(vae, DecodeOptions("bf16"))[0], z)}
    stand_in, report = decoder_view(vae, options, measure=timed(exact_ms, bf16_ms))
    faster = bf16_ms < exact_ms
    assert torch.equal(decoded(stand_in, z), expected[faster])
    assert (report.exact_ms, report.bf16_ms) == (exact_ms, bf16_ms)
    assert report.dtype == ("bfloat16" if faster else "float32")
    assert (report.extra_bytes > 0) == faster and (options.extra_bytes > 0) == faster
    assert f"{bf16_ms:.1f} ms" in report.reason and "dB" in report.reason
    again, second = decoder_view(vae, options, measure=never)
    assert torch.equal(decoded(again, z), expected[faster])
    assert second.reason == report.reason and second.to_dict()["psnr_db"] == report.psnr_db


def test_auto_measures_each_shape_dtype_and_vae_once(vae):
    options = DecodeOptions("auto")
    z = latent(vae)
    decoded(decoder_view(vae, options, measure=timed(2.0, 1.0))[0], z)
    decoded(decoder_view(vae, options, measure=timed(1.0, 2.0))[0], latent(vae, edge=8))
    decoded(decoder_view(vae, options, measure=timed(1.0, 2.0))[0], torch.cat([z, z]))
    decoded(decoder_view(make("sd15").vae, options, measure=timed(1.0, 2.0))[0], z)
    stand_in, report = decoder_view(vae, options, measure=never)
    decoded(stand_in, z)
    assert report.dtype == "bfloat16" and options.extra_bytes == report.extra_bytes > 0
    decoded(stand_in, latent(vae, edge=8))
    assert report.dtype == "float32" and report.decodes == 2


def test_auto_states_how_far_bfloat16_is_off(vae):
    z = latent(vae)
    stand_in, report = decoder_view(vae, DecodeOptions("auto"), measure=timed(2.0, 1.0))
    assert report.psnr_db is None
    picture = decoded(stand_in, z)
    assert abs(report.psnr_db - psnr(picture, decoded(vae, z))[0]) < 1e-3


def test_auto_leaves_float64_and_gradients_alone(vae):
    stand_in, report = decoder_view(vae, DecodeOptions("auto"), measure=never)
    stand_in.decode(latent(vae).requires_grad_()).sample.sum().backward()
    assert "gradients" in report.reason
    vae = vae.double()
    stand_in, report = decoder_view(vae, DecodeOptions("auto"), measure=never)
    z = latent(vae, dtype=torch.float64)
    assert torch.equal(decoded(stand_in, z), decoded(vae, z)) and "float64" in report.reason


class Noisy(torch.nn.Module):
    """A decoder that draws, from the generator it is given and from torch's own."""

    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Conv2d(4, 3, 1)

    def decode(self, z, return_dict=True, generator=None):
        z = z + torch.randn(z.shape, generator=generator).to(z.dtype) + torch.randn(z.shape).to(z.dtype)
        return (self.decoder(z),)


def test_measuring_draws_as_often_as_one_decode():
    def measure(work, device):
        return 1.0, [work() for _ in range(3)][-1]

    vae, z, results = Noisy(), torch.ones(1, 4, 8, 8), []
    for options in (DecodeOptions(), DecodeOptions("auto")):
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(2)
        picture = decoded(decoder_view(vae, options, measure=measure)[0], z, generator=generator)
        results.append((picture, generator.get_state(), torch.get_rng_state()))
    assert all(torch.equal(plain, auto) for plain, auto in zip(*results, strict=True))


def test_the_copy_follows_the_weights(vae):
    z, options = latent(vae), DecodeOptions("bf16")
    stand_in, _ = decoder_view(vae, options)
    first = decoded(stand_in, z)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1.0
    assert torch.allclose(decoded(stand_in, z), first + 1.0, atol=0.05)


def test_the_copy_goes_with_the_options_or_the_vae():
    vae, options = make("sd15").vae, DecodeOptions("bf16")
    decoded(decoder_view(vae, options)[0], latent(vae))
    kept = weakref.ref(options._known.record(vae).copies(vae)["decoder"])
    del options
    gc.collect()
    assert kept() is None
    options = DecodeOptions("bf16")
    decoded(decoder_view(vae, options)[0], latent(vae))
    assert options.extra_bytes > 0
    del vae
    gc.collect()
    assert options.extra_bytes == 0


def test_tiles_and_bfloat16_go_together(vae):
    tiling = copy.deepcopy(vae)
    tiling.enable_tiling()
    z = latent(vae)
    stand_in, report = decoder_view(vae, DecodeOptions("bf16", tiled=True))
    assert psnr(decoded(stand_in, z), decoded(tiling, z))[0] > 30.0
    assert report.tiled and report.dtype == "bfloat16"


def test_a_vae_that_is_set_to_tiles_stays_so(vae):
    vae.enable_tiling()
    stand_in, report = decoder_view(vae, DecodeOptions())
    assert torch.equal(decoded(stand_in, latent(vae)), decoded(vae, latent(vae))) and report.tiled
    decoded(stand_in, latent(vae, edge=8))
    assert not report.tiled


def test_tiled_auto_tiles_large_latents_only(vae):
    stand_in, report = decoder_view(vae, DecodeOptions(tiled="auto"))
    for edge, tiled in ((8, False), (16, False), (17, True)):
        picture = decoded(stand_in, latent(vae, edge=edge))
        assert report.tiled == tiled and torch.equal(picture, decoded(vae, latent(vae, edge=edge))) != tiled


def test_tiled_auto_turns_to_tiles_when_memory_runs_out(vae):
    def limited(module, inputs):
        if inputs[0].shape[-1] > 8:
            raise torch.OutOfMemoryError("no room")

    vae.decoder.register_forward_pre_hook(limited)
    stand_in, report = decoder_view(vae, DecodeOptions(tiled="auto"))
    decoded(stand_in, latent(vae))
    assert report.tiled and "memory ran out" in report.reason and not vae.use_tiling
    with pytest.raises(torch.OutOfMemoryError):
        decoded(decoder_view(vae, DecodeOptions())[0], latent(vae))


def test_a_vae_without_tiles_is_refused_before_work_starts():
    with pytest.raises(UnsupportedError, match="Noisy cannot decode in tiles"):
        decoder_view(Noisy(), DecodeOptions(tiled=True))
    stand_in, report = decoder_view(Noisy(), DecodeOptions(tiled="auto"))
    decoded(stand_in, torch.ones(1, 4, 8, 8))
    assert not report.tiled


def test_a_decode_replaced_on_the_object_stays_and_allows_nothing_else(vae):
    z, called, own = latent(vae), [], vae.decode
    vae.decode = lambda *args, **kwargs: called.append(1) or own(*args, **kwargs)
    for options in (DecodeOptions("bf16"), DecodeOptions("auto"), DecodeOptions(tiled=True)):
        with pytest.raises(UnsupportedError, match="replaced on the object"):
            decoder_view(vae, options)
    assert torch.equal(decoded(decoder_view(vae, DecodeOptions())[0], z), decoded(vae, z)) and len(called) == 2


@pytest.mark.parametrize("wrong", [{"precision": "fp16"}, {"precision": None}, {"tiled": "yes"}, {"tiled": None}])
def test_options_say_what_they_take(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        DecodeOptions(**wrong)


def test_weights_under_offload_hooks_are_not_copied(vae):
    from accelerate import cpu_offload

    z = latent(vae)
    expected = decoded(vae, z)
    cpu_offload(vae, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="offload hooks"):
        decoder_view(vae, DecodeOptions("bf16"))
    stand_in, report = decoder_view(vae, DecodeOptions("auto"), measure=never)
    assert torch.equal(decoded(stand_in, z), expected) and "offload" in report.reason


def test_model_offload_moves_the_vae_through_the_stand_in(vae):
    from accelerate import cpu_offload_with_hook

    z = latent(vae)
    expected = decoded(vae, z)
    _, hook = cpu_offload_with_hook(vae, torch.device("cpu"))
    moved = []
    hook.hook.pre_forward = lambda module, *args: moved.append(type(module))
    assert torch.equal(decoded(decoder_view(vae, DecodeOptions())[0], z), expected) and moved == [type(vae)]


def test_threads_measure_once_and_get_the_same_picture(vae):
    z, options, measured, pictures = latent(vae), DecodeOptions("auto"), [], []

    def measure(work, device):
        measured.append(1)
        return (2.0 if len(measured) == 1 else 1.0), work()

    def work():
        pictures.append(decoded(decoder_view(vae, options, measure=measure)[0], z))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 2 and len(pictures) == 8
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)


def test_two_threads_in_one_causal_video_decoder_do_not_mix():
    vae = make("wan").vae
    stand_in, _ = decoder_view(vae, DecodeOptions())
    latents = [latent(vae, seed=seed) for seed in range(4)]
    expected, pictures = [decoded(vae, z) for z in latents], {}

    def work(i):
        for _ in range(3):
            pictures[i] = decoded(stand_in, latents[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(pictures[i], expected[i]) for i in range(4))


def test_a_pipeline_decodes_through_the_stand_in():
    pipe = make("sdxl")
    arguments = FAMILIES["sdxl"].arguments(output_type="np")
    stand_in = copy.copy(pipe)
    stand_in.__dict__["vae"], report = decoder_view(pipe.vae, DecodeOptions("bf16"))
    pictures = [
        torch.from_numpy(each(**arguments, generator=torch.Generator().manual_seed(0)).images)
        for each in (pipe, stand_in, pipe)
    ]
    assert torch.equal(pictures[0], pictures[2]) and not torch.equal(pictures[0], pictures[1])
    assert psnr(pictures[1], pictures[0], data_range=1.0)[0] > 30.0 and report.decodes == 1


def test_the_clock_takes_the_least_of_a_few_runs():
    runs = []
    ms, result = measure_ms(lambda: runs.append(1) or len(runs), torch.device("cpu"))
    assert ms >= 0.0 and result == len(runs) == 3
