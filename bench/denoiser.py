"""Networks of `diffusers` with our ops inside against the same networks as they are and compiled by inductor.

Every row of a case runs in the same interleaved rounds, with the same threads, under inference mode, and returns fresh
memory. Beside each time stands its quality: the error of the prediction against the same weights in float64. The floor
is what the elementwise ops would take at the bandwidth of a copy: bytes they move, copied in pieces of the size of the
hidden states, which stay in cache as those do.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vivace.bench import denoiser_dit, denoiser_int8, int8_linears
from vivace.bench.compiling import compiled_peer
from vivace.bench.harness import Candidate, Claim, Timing, interleave, of_claims, ratio_of_medians, report
from vivace.errors import BackendError
from vivace.kernels.spec import UNIT_ROUNDOFF, error_of, missing
from vivace.models.pipelines.fused import fuse
from vivace.models.pipelines.fused.build import Builder
from vivace.models.pipelines.fused.ops import Ops

SEED = 7
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # name in a claim -> dtype
COMPILE_SECONDS = 300
SECONDS = {True: 14.0, False: 40.0}  # of timed rounds, quick or not
STEPS = 2  # of the pipeline whose overhead is measured: short calls make many rounds
DIT = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "sample_size": 32, "patch_size": 2}
MODERATE = {"num_attention_heads": 12, "attention_head_dim": 64}


@dataclass(frozen=True, eq=False)
class Network:
    """A network and the arguments of one evaluation; hidden: bytes of its hidden states."""

    module: Any
    arguments: dict[str, Any]
    hidden: int

    def run(self, module: Any) -> Tensor:
        """The prediction of `module`, this one or a stand-in for it."""
        with torch.inference_mode():
            prediction: Tensor = module(**self.arguments, return_dict=False)[0]
        return prediction

    def exact(self) -> Tensor:
        """The prediction of the same weights in float64."""
        wide = {name: _double(value) for name, value in self.arguments.items()}
        module = copy.deepcopy(self.module).double()
        return Network(module, wide, 0).run(module)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _network(
    kind: str, dtype: torch.dtype, tokens: tuple[int, int], config: Mapping[str, Any], **given: Any
) -> Network:
    """A diffusers class with random weights; tokens: [B, N] of the hidden states."""
    import diffusers

    torch.manual_seed(SEED)
    module = torch.nn.Module.to(getattr(diffusers, kind)(**config), dtype).eval()
    cast = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return Network(module, cast, tokens[0] * tokens[1] * width * dtype.itemsize)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def dit(dtype: torch.dtype, sizes: Mapping[str, Any] = DIT) -> Network:
    """DiT-S/2: 12 layers, 6 heads of 64, 4x32x32 latents in patches of 2: 256 tokens, 1000 classes; a guided pair."""
    edge = sizes["sample_size"]
    config = {**sizes, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000}
    given = {"timestep": torch.tensor([500, 500]), "class_labels": torch.tensor([207, 1000])}
    tokens = 2, (edge // sizes["patch_size"]) ** 2
    return _network("DiTTransformer2DModel", dtype, tokens, config, hidden_states=_noise(2, 4, edge, edge), **given)


def sd3(dtype: torch.dtype, sizes: Mapping[str, Any] = MODERATE) -> Network:
    """SD3-like: 3 blocks of width 768 (SD3.5 medium's kind, the first with two attentions), 256 + 77 tokens, a pair."""
    config = {
        **sizes, "sample_size": 32, "in_channels": 16, "out_channels": 16, "num_layers": 3, "pos_embed_max_size": 32,
        "joint_attention_dim": 768, "caption_projection_dim": 768, "pooled_projection_dim": 768,
        "qk_norm": "rms_norm", "dual_attention_layers": (0,),
    }  # fmt: skip
    given = {"encoder_hidden_states": _noise(2, 77, 768), "pooled_projections": _noise(2, 768)}
    given |= {"timestep": torch.tensor([500.0, 500.0]), "hidden_states": _noise(2, 16, 32, 32)}
    return _network("SD3Transformer2DModel", dtype, (2, 256), config, **given)


def flux(dtype: torch.dtype, sizes: Mapping[str, Any] = MODERATE) -> Network:
    """Flux-like: 1 block of two streams and 3 of one, width 768, 256 + 64 tokens, one picture."""
    config = {
        **sizes, "in_channels": 64, "num_layers": 1, "num_single_layers": 3, "joint_attention_dim": 768,
        "pooled_projection_dim": 768, "guidance_embeds": False, "axes_dims_rope": (16, 24, 24),
    }  # fmt: skip
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    ids = torch.stack([torch.zeros(16, 16), rows, columns], dim=-1).view(256, 3)
    given = {"hidden_states": _noise(1, 256, 64), "encoder_hidden_states": _noise(1, 64, 768), "img_ids": ids}
    given |= {"pooled_projections": _noise(1, 768), "timestep": torch.tensor([0.5]), "txt_ids": torch.zeros(64, 3)}
    return _network("FluxTransformer2DModel", dtype, (1, 320), config, **given)


CASES: dict[str, Callable[[torch.dtype], Network]] = {"DiT-S/2 x2": dit, "SD3-like x2": sd3, "Flux-like x1": flux}


def case_rows(case: str, dtype: str, quick: bool) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """Rows of one network: eager, with our ops, with packed linears too, compiled; refuses to time a wrong result."""
    network = CASES[case](getattr(torch, dtype))
    made = {"fused": fuse(network.module)} | ({} if quick else {"packed": fuse(network.module, pack=True)})
    modules = {"eager": network.module} | {name: stand_in for name, (stand_in, _) in made.items()}
    exact = network.exact()
    errors = {name: error_of(network.run(module), exact) for name, module in modules.items()}
    for name in made:
        if not errors[name] <= 2 * errors["eager"] + UNIT_ROUNDOFF[dtype]:
            raise BackendError(f"bench denoiser: {case} {dtype}: {name} errs by {errors[name]:.2g}; nothing was timed")
    candidates = {name: _candidate(network, module) for name, module in modules.items()}
    traffic = elementwise_bytes(network)
    candidates["copy"] = copies(traffic, network.hidden)
    compiled, seconds, reason = (None, None, "not compiled in a quick run") if quick else compile_network(network)
    if compiled is not None:
        candidates["torch.compile"] = _candidate(network, compiled)
        errors["torch.compile"] = error_of(network.run(compiled), exact)
    times = interleave(candidates, seconds=SECONDS[quick])
    rows = []
    for backend in (*modules, "torch.compile"):
        row = describe(backend, case, dtype, times) | {"error": errors.get(backend), "floor_bytes": traffic}
        if backend in made:
            row |= {"replaced": made[backend][1].to_dict()["replaced"]}
        if backend == "torch.compile":
            row |= {"compile_s": seconds, "reason": reason}
        rows.append(row)
    return rows, times


def _candidate(network: Network, module: Any) -> Candidate:
    return Candidate(lambda: network.run(module))


def describe(backend: str, case: str, dtype: str, times: Mapping[str, Timing]) -> dict[str, Any]:
    """One row of the report; ratios above 1 mean faster than the peer; no time: the row says why."""
    own = times.get(backend)

    def over(peer: str) -> float | None:
        return times[peer].median / own.median if own is not None and peer in times else None

    return {
        "op": "denoiser", "backend": backend, "case": case, "dtype": dtype,
        "ms": None if own is None else own.to_dict(), "floor_ms": times["copy"].median,
        "over_eager": over("eager"), "over_compile": over("torch.compile"),
        "threads": torch.get_num_threads(), "seed": SEED,
    }  # fmt: skip


def elementwise_bytes(network: Network) -> int:
    """Bytes that our ops move in one evaluation, from what each op says of its own call."""
    first = next(network.module.parameters())
    ops, moved = Ops(first.dtype, first.device), list[int]()

    def metered(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        spec = import_module(f"vivace.kernels.{name}").SPEC

        def run(*args: Any, **kwargs: Any) -> Any:
            moved.append(spec.bytes_moved(*args, **kwargs))
            return call(*args, **kwargs)

        return run

    ops.calls = {name: metered(name, call) for name, call in ops.calls.items()}
    network.run(Builder(ops).make("", network.module))
    return sum(moved)


def copies(traffic: int, piece: int) -> Candidate:
    """Copies that read and write `traffic` bytes in all, `piece` at a time between two buffers."""
    from vivace import _C

    source, target = (torch.ones(piece, dtype=torch.uint8) for _ in range(2))
    rounds = max(1, round(traffic / (2 * piece)))

    def copy_all() -> None:
        for _ in range(rounds):
            _C.copy_memcpy(target.data_ptr(), source.data_ptr(), piece, torch.get_num_threads())

    return Candidate(copy_all)


def compile_network(network: Network) -> tuple[Any, float | None, str | None]:
    """(compiled network, seconds it took, None), or (None, None, why not)."""
    compiled = torch.compile(network.module, dynamic=False)
    begin = time.perf_counter()
    call, reason = compiled_peer(lambda: network.run(compiled), (), COMPILE_SECONDS, compiled=True)
    return (None, None, reason) if call is None else (compiled, time.perf_counter() - begin, None)


def fused_vs_eager(short: str, quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Time of the eager DiT-S/2 over that of the fused one, medians of the same rounds."""
    name, dtype, case = f"denoiser.fused_vs_eager_{short}", DTYPES[short], "DiT-S/2 x2"
    if (reason := _cannot()) is not None:
        return [], Claim(name, ">=", 1.0, reason)
    rows, times = case_rows(case, dtype, quick)
    value, interval = ratio_of_medians([times["eager"]], [times["fused"]], SEED)
    eager, fused = rows[:2]
    how = (
        f"{case}, {dtype}, {torch.get_num_threads()} threads, forward under inference mode, fresh outputs both; error "
        f"against float64 {fused['error']:.2g}, eager {eager['error']:.2g}; medians of interleaved rounds"
    )
    return rows, Claim(name, ">=", 1.0, how, value, (interval[0], interval[1]), len(times["fused"].ms))


def passthrough_overhead(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Time of a pipeline that vivace drives by its scheduler's own plan over that of the plain one."""
    name = "denoiser.passthrough_overhead"
    if (reason := _cannot()) is not None:
        return [], Claim(name, "<=", 1.03, reason)
    import vivace

    plain = pipeline()
    driven = type(plain)(**plain.components)  # the same weights: where copies lie in memory makes a few hundredths
    driven.set_progress_bar_config(disable=True)
    plan = vivace.Plan.from_diffusers(driven.scheduler, steps=STEPS)
    vivace.accelerate(driven, plan)
    try:
        same = torch.equal(_pictures(plain), _pictures(driven))
        if not same:
            raise BackendError("bench denoiser: the accelerated pipeline draws another picture; nothing was timed")
        candidates = {"plain": Candidate(lambda: _pictures(plain)), "driven": Candidate(lambda: _pictures(driven))}
        times = interleave(candidates, seconds=1.7 * SECONDS[quick], least=9)
    finally:
        vivace.restore(driven)
    value, interval = ratio_of_medians([times["driven"]], [times["plain"]], SEED)
    rows = [
        {
            "op": "pipeline", "backend": backend, "case": f"DiT-S/2, {STEPS} steps", "dtype": "float32",
            "ms": times[backend].to_dict(), "over_eager": times["plain"].median / times[backend].median,
            "agree": same, "threads": torch.get_num_threads(), "seed": SEED,
        }
        for backend in ("plain", "driven")
    ]  # fmt: skip
    how = (
        f"DiTPipeline, DiT-S/2, {STEPS} guided DDIM steps, float32, {torch.get_num_threads()} threads; pictures equal "
        "bit for bit; medians of interleaved calls"
    )
    return rows, Claim(name, "<=", 1.03, how, value, (interval[0], interval[1]), len(times["driven"].ms))


def pipeline() -> Any:
    """DiTPipeline around DiT-S/2, with a small VAE."""
    import diffusers

    torch.manual_seed(SEED)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(**kinds, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4).eval()
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DiTPipeline(CASES["DiT-S/2 x2"](torch.float32).module, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pictures(pipe: Any) -> Tensor:
    """One call of the pipeline; its pictures."""
    generator = torch.Generator().manual_seed(SEED)
    options = {"guidance_scale": 4.0, "num_inference_steps": STEPS, "output_type": "np", "generator": generator}
    return torch.as_tensor(pipe([207], **options).images)


def _cannot() -> str | None:
    """Why nothing can be measured here."""
    try:
        import_module("diffusers")
    except ImportError as error:
        return f"diffusers cannot be imported ({error}); run make bench-setup"
    return missing("cpu")


CLAIMS: Mapping[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {
    "denoiser.fused_vs_eager_fp32": lambda quick: fused_vs_eager("fp32", quick),
    "denoiser.fused_vs_eager_bf16": lambda quick: fused_vs_eager("bf16", quick),
    "denoiser.passthrough_overhead": passthrough_overhead,
    **denoiser_dit.CLAIMS,
    **denoiser_int8.CLAIMS,
    **int8_linears.CLAIMS,
}


def run(op: str | None = None, claim: str | None = None, quick: bool = False) -> dict[str, Any]:
    """All rows and claims; with `claim`, that one and the rows behind it."""
    rows, claims = of_claims("denoiser", CLAIMS, op, claim, quick)
    if claim is None and not quick and _cannot() is None:
        for case in list(CASES)[1:]:
            for dtype in DTYPES.values():
                rows += case_rows(case, dtype, quick)[0]
        rows += denoiser_dit.full_rows() + denoiser_int8.full_rows() + int8_linears.full_rows()
    return report("denoiser", rows, claims)
