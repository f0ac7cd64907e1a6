"""The C++ runner of the native DiT: what `DiT.forward` computes, from addresses, with bits of its own."""

import pytest
import torch

from vivace import _C
from vivace.kernels import spec
from vivace.kernels.linear import pack_weight
from vivace.models.dit import NORM_EPS, DiT, Modulation
from vivace.models.dit_config import DiTConfig

SIZES = {
    "plain": DiTConfig(heads=2, head_dim=16, channels=3, out_channels=3, layers=2, size=8, patch=2, classes=5),
    "learned variance": DiTConfig(
        heads=3, head_dim=24, channels=4, out_channels=8, layers=3, size=8, patch=2, classes=5, gelu="none"
    ),
    "no bias": DiTConfig(
        heads=1, head_dim=20, channels=1, out_channels=1, layers=1, size=6, patch=3, classes=2, attention_bias=False
    ),
}
LANES = 5


class Runner:
    """A model packed for C++, and calls of it."""

    def __init__(self, model):
        self.model, self.config, self.kept = model, model.config, []
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.dit = _C.Dit(**self.arguments())

    def arguments(self):
        config, model = self.config, self.model
        return {
            "heads": config.heads,
            "patch": config.patch,
            "channels": config.channels,
            "out_channels": config.out_channels,
            "gelu": config.gelu,
            "eps": (NORM_EPS, config.norm_eps, NORM_EPS),
            "dtype": self.dtype,
            "patches": self.packed(model.patches),
            "blocks": [(*map(self.packed, (b.qkv, b.out, b.up, b.down)), self.dtype, self.dtype) for b in model.blocks],
            "final": self.packed(model.final),
        }

    def packed(self, layer):
        weight, bias = pack_weight(layer.weight), None if layer.bias is None else layer.bias.float()
        self.kept += [weight, bias]
        return weight.data_ptr(), *weight.shape, self.dtype, 0 if bias is None else bias.data_ptr(), 0, 0

    def call(self, x, lanes, modulation, size, threads=2):
        """Arguments of `run` and its results [B, n, C, H, W]; modulation: raw, [B, n, 6L + 2, D] float32."""
        config, (branches, n) = self.config, modulation.shape[:2]
        grid = (size[0] // config.patch, size[1] // config.patch)
        tokens = grid[0] * grid[1]
        positions = self.model.position_table(grid)
        if self.model.dtype == torch.bfloat16:
            positions = positions.bfloat16().float()  # as the model holds them
        outs = torch.full((branches, n, config.channels, *size), float("nan"))
        need = self.dit.arena_bytes(branches * n, n, tokens, threads)
        raw = torch.full((need + 64,), 255, dtype=torch.uint8)
        arena = raw[-raw.data_ptr() % 64 :]
        self.alive = x, positions, modulation, raw
        return {
            "x": (x.data_ptr(), x.stride(0), str(x.dtype).removeprefix("torch.")),
            "capacity": len(x),
            "lanes": lanes,
            "size": size,
            "positions": positions.data_ptr(),
            "modulations": [modulation[b, j].data_ptr() for b in range(branches) for j in range(n)],
            "x_scales": [],
            "outs": [outs[b].data_ptr() for b in range(branches)],
            "arena": arena.data_ptr(),
            "arena_bytes": need,
            "threads": threads,
        }, outs

    def __call__(self, *args, **kwargs):
        arguments, outs = self.call(*args, **kwargs)
        assert self.dit.run(**arguments) == (None, -1)
        return outs


def make(config, dtype):
    """A model whose every part matters, its modulation far from zero."""
    torch.manual_seed(3)
    model = DiT(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05 if name.endswith("bias") else 0.4 * parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def inputs(config, size, n, branches):
    """Latents of every lane, timesteps and labels of n samples."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(LANES, config.channels, *size, generator=g)
    t = 999 * torch.rand(n, generator=g)
    return x, t, torch.randint(0, config.classes + 1, (branches, n), generator=g)


def raw(model, t, labels):
    """Modulation [B, n, 6L + 2, D] float32 without the 1 of scales, as the runner takes it."""
    made = model.condition(t, labels)
    blocks = made.blocks.permute(1, 2, 0, 3, 4).flatten(2, 3).float()
    table = torch.cat([blocks, made.final.float()], 2)
    table[:, :, 1::3] -= 1
    return table


def exact(model, table, x):
    """Predictions in float64 from the same weights and the same modulation."""
    wide = DiT.of(model.config, {name: value.double() for name, value in model.state_dict().items()})
    wide._positions_at = lambda grid: model._positions_at(grid).double()
    return torch.stack(run(wide, table.double(), x.double()))


def run(model, table, x):
    """`DiT.forward` from a raw modulation."""
    layers = model.config.layers
    full = table.clone()
    full[:, :, 1::3] += 1
    full = full.to(model.dtype)
    modulation = Modulation(full[:, :, :-2].unflatten(2, (layers, 6)).permute(2, 0, 1, 3, 4), full[:, :, -2:])
    hidden = model.embed(x).repeat(modulation.branches, 1, 1)
    for i in range(layers):
        hidden = model.block(i, hidden, modulation)
    return model.head(hidden, modulation, tuple(x.shape[2:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("branches", [1, 2])
def test_predictions_are_those_of_float64_within_the_tolerance_rule(name, dtype, branches):
    config = SIZES[name]
    model = make(config, dtype)
    runner = Runner(model)
    for n, scale in ((1, (1, 1)), (3, (1, 1)), (2, (1, 2)), (1, (3, 1))):  # native and other resolutions
        size = (config.size * scale[0], config.size * scale[1])
        x, t, labels = inputs(config, size, n, branches)
        lanes, table = [3, 0, 4][:n], raw(model, t, labels)
        chosen = x[lanes].to(dtype)
        expected, eager = exact(model, table, chosen), torch.stack(run(model, table, chosen))
        found = runner(x, lanes, table, size)
        holds, error, bound = spec.within_tolerance(found.to(dtype), eager, expected)
        assert holds, f"n = {n}, size {size}: error {error:.3g} exceeds {bound:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_runner_and_forward_agree_from_the_same_timesteps(dtype):
    config = SIZES["plain"]
    model = make(config, dtype)
    x, t, labels = inputs(config, (8, 8), 2, 2)
    found = Runner(model)(x, [0, 1], raw(model, t, labels), (8, 8))
    forward = torch.stack(model(x[:2].to(dtype), t, labels)).float()
    assert spec.error_of(found, forward) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sample_has_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(dtype):
    config = SIZES["learned variance"]
    model = make(config, dtype)
    runner = Runner(model)
    x, t, labels = inputs(config, (16, 8), 3, 2)
    table = raw(model, t, labels)
    whole = runner(x, [4, 1, 2], table, (16, 8))
    for threads in (1, 2, 5):
        assert torch.equal(runner(x, [4, 1, 2], table, (16, 8), threads=threads), whole)
        for j, lane in enumerate((4, 1, 2)):
            for branch in (0, 1):
                alone = runner(x, [lane], table[branch : branch + 1, j : j + 1], (16, 8), threads=threads)
                assert torch.equal(alone[0, 0], whole[branch, j])
    x[[0, 3]] = float("nan")
    assert torch.equal(runner(x, [4, 1, 2], table, (16, 8)), whole)


def test_latents_of_both_dtypes_and_spaced_lanes_give_the_same():
    config = SIZES["plain"]
    model = make(config, torch.bfloat16)
    runner = Runner(model)
    x, t, labels = inputs(config, (8, 8), 2, 1)
    table = raw(model, t, labels)
    found = runner(x, [2, 1], table, (8, 8))
    assert torch.equal(runner(x.bfloat16(), [2, 1], table, (8, 8)), found)
    spaced = torch.full((LANES, 2, config.channels, 8, 8), float("nan"))
    spaced[:, 0] = x
    assert torch.equal(runner(spaced[:, 0], [2, 1], table, (8, 8)), found)


def test_a_larger_arena_serves_smaller_calls_one_after_the_other():
    config = SIZES["plain"]
    model = make(config, torch.float32)
    runner = Runner(model)
    large, _ = runner.call(*call_of(runner, (16, 16), 3, 2))
    owner = runner.alive
    for size, n, branches in (((16, 16), 3, 2), ((8, 8), 1, 1), ((4, 16), 3, 2), ((2, 2), 2, 1)):
        small, outs = runner.call(*call_of(runner, size, n, branches))
        runner.dit.run(**small)
        alone = outs.clone()
        outs.zero_()
        runner.dit.run(**(small | {"arena": large["arena"], "arena_bytes": large["arena_bytes"]}))
        assert torch.equal(alone, outs) and outs.isfinite().all()
    assert owner


def call_of(runner, size, n, branches):
    """x, lanes, modulation and size of a call."""
    x, t, labels = inputs(runner.config, size, n, branches)
    return x, list(range(n)), raw(runner.model, t, labels), size


def test_the_clock_counts_every_kind_of_stage():
    runner = Runner(make(SIZES["plain"], torch.float32))
    arguments, _ = runner.call(*call_of(runner, (8, 8), 1, 2))
    clock, fault = runner.dit.run(**arguments, clock=True, check=True)
    assert len(clock) == 5 and clock[3] == 0 and all(part > 0 for part in (*clock[:3], clock[4])) and fault == -1


REFUSED = {
    "no multiples of the patch": {"size": (7, 8)},
    "height is 0": {"size": (0, 8)},
    "lane 5 of sample 0 is not one of 5": {"lanes": [5, 0]},
    "lane -1 of sample 1": {"lanes": [0, -1]},
    "modulations for 1 branches of 1 samples": {"lanes": [0], "outs": [64]},
    "a row's modulation has no memory": {"modulations": [0, 64]},
    "a branch's result has no memory": {"outs": [0]},
    "branches is 0": {"outs": [], "modulations": []},
    "x has no memory": {"x": (0, 192, "float32")},
    "dtype float16 has no kernel": {"x": (64, 192, "float16")},
    "lanes of -1 elements": {"x": (64, -1, "float32")},
    "positions has no memory": {"positions": 0},
    "arena has no memory": {"arena": 0},
    "the arena is not aligned": {"arena": 100},
    "the arena has 64 bytes": {"arena_bytes": 64},
    "number of lanes is 0": {"capacity": 0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_illegal_calls_are_refused(message):
    runner = Runner(make(SIZES["plain"], torch.float32))
    arguments, _ = runner.call(*call_of(runner, (8, 8), 2, 1))
    with pytest.raises(ValueError, match=f"^Dit: .*{message}"):
        runner.dit.run(**(arguments | REFUSED[message]))


WRONG = {
    "width 32 is no multiple of 5 heads": {"heads": 5},
    "hold no prediction of 3 channels": {"out_channels": 2},
    "patch is 0": {"patch": 0},
    "gelu is erf": {"gelu": "erf"},
    "dtype float64 has no kernel": {"dtype": "float64"},
    "eps is nan": {"eps": (1e-6, float("nan"), 1e-6)},
    "a model needs a block": {"blocks": []},
    r"patches is \[32, 13\]; needs \[32, 12\]": {"patches": (64, 32, 13, "float32", 0, 0, 0)},
    "final has no memory aligned": {"final": (63, 12, 32, "float32", 0, 0, 0)},
}


@pytest.mark.parametrize("message", WRONG)
def test_weights_that_do_not_fit_are_refused(message):
    arguments = Runner(make(SIZES["plain"], torch.float32)).arguments()
    with pytest.raises(ValueError, match=f"^Dit: .*{message}"):
        _C.Dit(**(arguments | WRONG[message]))
