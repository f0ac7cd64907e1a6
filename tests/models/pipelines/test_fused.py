"""Our ops inside foreign networks: what is replaced, how exact it is, and what stays as it was."""

from __future__ import annotations

import copy
import json
from functools import cache
from importlib import import_module

import pytest
import torch
from tests.models.pipelines.tiny import FAMILIES, make
from torch import nn

from vivace.errors import BackendError
from vivace.kernels.spec import UNIT_ROUNDOFF, choose, error_of, why_not
from vivace.models.pipelines.fused import Fused, fuse
from vivace.models.pipelines.fused.build import structure
from vivace.models.pipelines.fused.ops import OPS

# op -> places in one forward of the tiny network of a family
GOLDEN = {
    "dit": {"adaln_modulate": 3, "gated_residual": 3, "gelu": 3, "norm_modulate": 4},
    "pixart": {"adaln_modulate": 3, "gated_residual": 6, "gelu": 4, "norm_modulate": 4},
    "sd3": {"adaln_modulate": 5, "gated_residual": 6, "gelu": 5, "norm_modulate": 8, "qk_norm_rope": 7},
    "flux": {"adaln_modulate": 4, "gated_residual": 6, "gelu": 6, "norm_modulate": 7, "qk_norm_rope": 6},
    "sd15": {"adaln_modulate": 12, "gated_residual": 6, "gelu": 6, "norm_modulate": 6},
    "sdxl": {"adaln_modulate": 14, "gated_residual": 7, "gelu": 7, "norm_modulate": 7},
    "flux2": {"adaln_modulate": 4, "gated_residual": 6, "norm_modulate": 7, "qk_norm_rope": 6},
    "qwen": {"adaln_modulate": 6, "gated_residual": 6, "gelu": 6, "norm_modulate": 8, "qk_norm_rope": 6},
    "lumina2": {"adaln_modulate": 7, "gated_residual": 7, "norm_modulate": 23, "qk_norm_rope": 7},
    "sana": {"adaln_modulate": 3, "gated_residual": 6, "gelu": 1, "norm_modulate": 5},
    "hunyuan_dit": {"adaln_modulate": 12, "gated_residual": 6, "gelu": 6, "norm_modulate": 9, "qk_norm_rope": 12},
    "cogvideox": {"gated_residual": 12, "gelu": 3, "norm_modulate": 14, "qk_norm_rope": 3},
    "wan": {"adaln_modulate": 6, "gated_residual": 3, "gelu": 4, "norm_modulate": 4, "qk_norm_rope": 6},
    "ltx": {"adaln_modulate": 3, "gated_residual": 6, "gelu": 4, "norm_modulate": 4, "qk_norm_rope": 6},
    "hunyuan_video": {"adaln_modulate": 5, "gated_residual": 7, "gelu": 6, "norm_modulate": 8, "qk_norm_rope": 6},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPECS = {op: import_module(f"vivace.kernels.{op}").SPEC for op in OPS}
BACKENDS = [
    backend
    for backend in ("reference", "cpu")
    if all(why_not(spec, backend, "cpu", "float32") is None for spec in SPECS.values())
]


class Recorded(Exception):
    """The arguments of the network are known; the call need not go on."""


@cache
def network(family, dtype="float32"):
    """(network, args, kwargs) of the first evaluation in a call of the tiny pipeline; nobody may change the network."""
    pipe, tiny, found = make(family, DTYPES[dtype]), FAMILIES[family], []
    module = getattr(pipe, tiny.denoisers[0])

    def stop(module, args, kwargs):
        found.append((module, args, kwargs))
        raise Recorded

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    with torch.no_grad(), pytest.raises(Recorded):
        pipe(**tiny.arguments(DTYPES[dtype]), generator=torch.Generator().manual_seed(0))
    handle.remove()
    return found[0]


def fresh(family, dtype="float32"):
    """The same with a copy of the network that a test may change."""
    module, args, kwargs = network(family, dtype)
    return copy.deepcopy(module), args, kwargs


def widened(value):
    """Arguments as float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: widened(item) for name, item in value.items()}
    return type(value)(map(widened, value)) if isinstance(value, (list, tuple)) else value


def run(module, args, kwargs):
    """The network's prediction."""
    with torch.inference_mode():
        out = module(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out.sample


@cache
def exact_and_eager(family, dtype):
    """Predictions of the plain network in float64 and in `dtype`."""
    module, args, kwargs = network(family, dtype)
    wide = copy.deepcopy(module).double()
    return run(wide, widened(args), widened(kwargs)), run(module, args, kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", GOLDEN)
def test_fused_network_errs_at_most_twice_as_much_as_the_eager_one(family, dtype, backend):
    module, args, kwargs = network(family, dtype)
    exact, eager = exact_and_eager(family, dtype)
    fused = run(fuse(module, backend=backend)[0], args, kwargs)
    assert fused.dtype == eager.dtype and fused.shape == eager.shape
    assert error_of(fused, exact) <= 2 * error_of(eager, exact) + UNIT_ROUNDOFF[dtype]


@pytest.mark.parametrize("family", GOLDEN)
def test_every_place_of_the_report_runs_our_op_once(family, monkeypatch):
    calls = dict.fromkeys(OPS, 0)

    def counting(op, call):
        def counted(*args, **kwargs):
            calls[op] += 1
            return call(*args, **kwargs)

        return counted

    for op in OPS:
        monkeypatch.setattr(
            f"vivace.kernels.{op}.{op}", counting(op, getattr(import_module(f"vivace.kernels.{op}"), op))
        )
    module, args, kwargs = network(family)
    stand_in, report = fuse(module, backend="reference")
    run(stand_in, args, kwargs)
    assert {entry.op: entry.places for entry in report.replaced} == GOLDEN[family]
    assert {op: count for op, count in calls.items() if count} == GOLDEN[family]
    assert report.left == ()


@pytest.mark.parametrize("family", ["dit", "sd3", "flux", "sd15"])
def test_the_original_is_not_touched(family):
    module, args, kwargs = network(family)
    before, plain = structure(module), run(module, args, kwargs)
    types = [type(part) for part in module.modules()]
    stand_in, _ = fuse(module, backend="reference")
    run(stand_in, args, kwargs)
    assert structure(module) == before and [type(part) for part in module.modules()] == types
    assert torch.equal(run(module, args, kwargs), plain)
    assert type(stand_in) is type(module) and stand_in.config is module.config
    shared = zip(stand_in.parameters(), module.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in shared)


def test_report_is_the_same_every_time_and_goes_into_json():
    module, _, _ = fresh("sd3")
    module.transformer_blocks[1].register_forward_hook(lambda *given: None)
    first, second = (fuse(module, backend="reference")[1] for _ in range(2))
    assert first == second
    told = json.loads(json.dumps(first.to_dict()))
    assert told["replaced"]["gelu"] == {
        "places": 5,
        "backend": "reference",
        "reason": choose(SPECS["gelu"], "cpu", "float32", "reference").reason,
    }
    names = ["transformer_blocks.1"]
    assert told["left"] == [{"kind": "JointTransformerBlock", "reason": "forward hooks", "names": names}]
    assert "left: 1 JointTransformerBlock, forward hooks" in str(first)


class LowRank(nn.Module):
    """A linear with a low-rank update beside it, as LoRA libraries put in its place."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, hidden):
        return self.base_layer(hidden) + self.up(self.down(hidden))


def wrap_linears(module):
    """LowRank around every linear of the network's blocks; deterministic."""
    torch.manual_seed(3)
    for parent in [part for part in module.modules() if not isinstance(part, LowRank)]:
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear:
                setattr(parent, name, LowRank(child))


@pytest.mark.parametrize("family", ["dit", "sd3", "flux", "wan", "qwen", "hunyuan_video"])
def test_lora_loaded_later_takes_part(family):
    module, args, kwargs = fresh(family)
    fused = Fused(module, backend="reference")
    without = run(fused.current()[0], args, kwargs)
    wrap_linears(module)
    plain = run(module, args, kwargs)
    stand_in, report = fused.current()
    assert error_of(run(stand_in, args, kwargs), plain) < 1e-5
    assert error_of(without, plain) > 1e-3
    assert {entry.op: entry.places for entry in report.replaced} == GOLDEN[family]


def test_stand_in_is_kept_until_the_module_changes():
    from diffusers.models.attention_processor import AttnProcessor

    module, _, _ = fresh("sd15")
    fused = Fused(module, backend="reference")
    first = fused.current()[0]
    assert fused.current()[0] is first
    changes = [
        lambda: module.set_attn_processor(AttnProcessor()),
        lambda: module.enable_freeu(0.9, 0.2, 1.2, 1.4),
        lambda: module.mid_block.register_forward_hook(lambda *given: None),
        lambda: module.to(torch.bfloat16),
        lambda: module.train(),
    ]
    for change in changes:
        change()
        again = fused.current()[0]
        assert again is not first
        first = again
    assert first is module  # training


def left_of(module):
    """{reason: names} of what a stand-in left."""
    groups = fuse(module, backend="reference")[1].to_dict()["left"]
    return {group["reason"]: group["names"] for group in groups}


def test_pieces_that_keep_their_own_forward_are_listed_with_the_reason():
    from diffusers.models.activations import ApproximateGELU
    from diffusers.models.attention import BasicTransformerBlock

    module, _, _ = fresh("dit")
    first, second, third = module.transformer_blocks
    first._chunk_size, first._chunk_dim = 1, 1
    second.ff.net[0] = ApproximateGELU(16, 64)
    third.norm1.norm.register_forward_hook(lambda *given: None)
    module.transformer_blocks.append(BasicTransformerBlock(16, 2, 8, num_embeds_ada_norm=5, norm_type="ada_norm"))
    module.norm_out.forward = lambda hidden: hidden
    module.eval()
    left = left_of(module)
    assert left.pop("chunked feed-forward") == ["transformer_blocks.0"]
    assert left.pop("x * sigmoid(1.702 x) is not among our ops") == ["transformer_blocks.1.ff.net.0"]
    assert left.pop("LayerNorm inside: forward hooks") == ["transformer_blocks.2.norm1"]
    assert left.pop("forward hooks") == ["transformer_blocks.2.norm1.norm"]
    assert left.pop("norm_type 'ada_norm'") == ["transformer_blocks.3"]
    (reason,) = left
    assert reason.startswith("its forward is replaced") and left[reason] == ["norm_out"]


def test_a_custom_attention_processor_is_left():
    class Custom:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return hidden_states, encoder_hidden_states

    module, _, _ = fresh("sd3")
    module.transformer_blocks[1].attn.set_processor(Custom())
    assert left_of(module) == {"attention processor Custom": ["transformer_blocks.1.attn"]}


def test_an_unknown_block_is_listed_and_its_norms_are_replaced():
    class SecretBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, hidden):
            return self.linear(self.norm(hidden))

    module = nn.Sequential(SecretBlock(), SecretBlock()).eval()
    stand_in, report = fuse(module, backend="reference")
    assert left_of(module) == {"no forward of ours for this class": ["0", "1"]}
    assert report.places("norm_modulate") == 2
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert error_of(stand_in(hidden), module(hidden)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_leave_the_module_as_it_is(dtype):
    module, _, _ = fresh("dit")
    stand_in, report = fuse(module.to(dtype))
    assert stand_in is module and report.replaced == ()
    assert report.left[0].reason == f"dtype {str(dtype)[6:]}; our ops take float32 and bfloat16"


def test_training_mode_leaves_the_module_as_it_is():
    module, _, _ = fresh("dit")
    stand_in, report = fuse(module.train())
    assert stand_in is module and report.left[0].reason == "training mode; call eval()"


@pytest.mark.parametrize("family", ["dit", "sd3", "flux"])
def test_gradients_and_autocast_take_the_original_path(family):
    module, args, kwargs = network(family)
    stand_in, _ = fuse(module, backend="reference")
    with torch.enable_grad():
        plain, ours = (one(*args, **kwargs)[0] for one in (module, stand_in))
    assert torch.equal(plain, ours) and ours.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = run(module, args, kwargs), run(stand_in, args, kwargs)
    assert torch.equal(plain, ours)


def test_a_block_that_starts_training_takes_the_original_path():
    module, args, kwargs = fresh("dit")
    stand_in, _ = fuse(module, backend="reference")
    plain = run(module, args, kwargs)
    module.train()
    assert torch.equal(run(stand_in, args, kwargs), plain)  # no dropout in this network


def test_gated_attention_arguments_take_the_original_path():
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=8, attention_type="gated").eval()
    nn.init.constant_(block.fuser.alpha_attn, 0.5)
    hidden, text, objects = (torch.randn(1, n, d) for n, d in ((6, 16), (3, 8), (2, 8)))
    given = {"encoder_hidden_states": text, "cross_attention_kwargs": {"gligen": {"objs": objects}}}
    stand_in, report = fuse(block, backend="reference")
    with torch.inference_mode():
        assert error_of(stand_in(hidden, **given), block(hidden, **given)) < 1e-6
        assert report.places("adaln_modulate") == 2


def test_offload_hooks_of_accelerate_run_around_the_stand_in():
    import accelerate

    module, args, kwargs = fresh("dit")
    plain = run(module, args, kwargs)
    seen = []

    class Watching(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(module, Watching())
    stand_in, report = fuse(module, backend="reference")
    ours = run(stand_in, args, kwargs)
    assert seen == [stand_in] and report.places("adaln_modulate") == 3
    assert error_of(ours, plain) < 1e-6 and not torch.equal(ours, plain)


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3"])
def test_weights_that_hooks_bring_to_each_submodule_leave_it_as_it_is(family):
    import accelerate

    module, args, kwargs = fresh(family)
    plain = run(module, args, kwargs)
    accelerate.cpu_offload(module, execution_device="cpu")  # weights are on the meta device between calls
    stand_in, report = fuse(module, backend="reference")
    assert error_of(run(stand_in, args, kwargs), plain) < 1e-6
    assert family == "dit" or any("a hook of accelerate" in piece.reason for piece in report.left)


def test_without_a_fast_backend_nothing_is_replaced(monkeypatch):
    module, args, kwargs = network("dit")
    for spec in SPECS.values():
        monkeypatch.setattr(import_module(spec.impls["cpu"]), "why_not", lambda device, dtype: "not built")
    choose.__globals__["_decide"].cache_clear()
    try:
        stand_in, report = fuse(module)
    finally:
        choose.__globals__["_decide"].cache_clear()
    assert stand_in is module and report.replaced == ()
    assert any(piece.reason.startswith("gelu has no fast backend") for piece in report.left)


@pytest.mark.parametrize("family", GOLDEN)
def test_blocks_of_a_stand_in_can_be_observed_and_change_nothing(family):
    from vivace.models.pipelines.blocks import ModuleParts

    module, args, kwargs = network(family)
    stand_in, _ = fuse(module, backend="reference")
    parts, seen = ModuleParts(stand_in), []

    def observe(call):
        seen.append(call.info)
        return call.compute()

    observed = run(lambda *given, **named: parts.forward(observe, *given, **named), args, kwargs)
    assert torch.equal(observed, run(stand_in, args, kwargs))
    assert tuple(seen) == ModuleParts(module).blocks


def test_a_backend_that_cannot_run_is_an_error_when_named():
    with pytest.raises(BackendError, match="backend=triton cannot run cpu tensors"):
        fuse(network("dit")[0], backend="triton")


def test_threads_share_a_stand_in():
    from concurrent.futures import ThreadPoolExecutor

    module, args, kwargs = network("qwen")
    stand_in, _ = fuse(module, backend="reference")
    want = run(stand_in, args, kwargs)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run(stand_in, args, kwargs), range(8)))
    assert all(torch.equal(result, want) for result in results)
