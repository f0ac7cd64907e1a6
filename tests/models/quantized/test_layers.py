"""Layers on quantized weights, and the native DiT under precision rules."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.models.quantized.made import layer, rounded
from torch import nn

from vivace.engine.plan import Rule, Variant
from vivace.engine.precision import precisions_of
from vivace.errors import StateError, UnsupportedError
from vivace.kernels.spec import error_of
from vivace.models.dit import DiT
from vivace.models.quantized.layers import CastLinear, QuantizedLinear, forward_at
from vivace.models.quantized.native import layer_names
from vivace.models.quantized.stand_in import stand_in

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fake(x, made, scale=None):
    """x through the layer's numbers, float64 but for the scales, which are defined in float32."""
    x = x.double() if made.smooth is None else (x.float() * made.smooth).double()
    scale = (x.abs().amax(-1, keepdim=True).float() / 127 if scale is None else scale).double()
    q = (x / scale).round().clamp(-127, 127)
    weight = made.weight.double() * made.weight_scale.double()[:, None]
    return q * scale @ weight.T


def row_of(blocks, *rules):
    return precisions_of(
        Variant(rules=tuple(Rule((first, last), site, precision=name) for first, last, site, name in rules)), blocks
    )


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("smooth", [False, True])
def test_a_layer_computes_what_its_numbers_say(dtype, smooth):
    made, bias = layer(40, 64, smooth=smooth), torch.randn(40).to(dtype)
    x = torch.randn(2, 5, 64).to(dtype)
    out = QuantizedLinear("x", made, bias)(x)
    assert out.dtype == dtype and out.shape == (2, 5, 40)
    assert (
        error_of(out, fake(x, made) + bias.double())
        < 4 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    )
    assert torch.equal(QuantizedLinear("x", made, bias)(x[1]), out[1]) and QuantizedLinear("x", made)(
        x[:, :0]
    ).shape == (2, 0, 40)


def test_what_follows_the_product_is_in_it():
    made, x = layer(8, 16), torch.randn(2, 3, 16)
    bias, gate, residual = torch.randn(8), torch.randn(2, 1, 8), torch.randn(2, 3, 8)
    out = QuantizedLinear("x", made, bias)(x, activation="gelu_tanh", gate=gate, residual=residual)
    expected = residual + gate * F.gelu(fake(x, made) + bias, approximate="tanh")
    assert error_of(out, expected) < 1e-5


def test_static_scales_go_by_timestep_group():
    made, x = layer(8, 16, groups=3), torch.randn(2, 4, 16)
    twin = QuantizedLinear("blocks.0.up", made)
    with forward_at(groups=torch.tensor([2])):
        assert error_of(twin(x), fake(x, made, made.x_scale[2])) < 1e-6
        with forward_at(timesteps=[3.0], groups=torch.tensor([0, 1])):
            each = torch.stack([fake(x[i], made, made.x_scale[i]) for i in range(2)])
            assert error_of(twin(x), each) < 1e-6
        assert error_of(twin(x), fake(x, made, made.x_scale[2])) < 1e-6
    with pytest.raises(StateError, match=r"blocks\.0\.up: its activation scales go by timestep"):
        twin(x)


def test_odd_numbers_go_through_and_are_named_when_debugging(monkeypatch):
    made, x = layer(8, 16), torch.randn(2, 3, 16)
    x[1, 2, 5] = torch.inf
    twin = QuantizedLinear("blocks.3.qkv", made, torch.zeros(8))
    monkeypatch.delenv("VIVACE_DEBUG", raising=False)
    out = twin(x)
    assert out[1, 2].isnan().all() and out.isnan().sum() == 8
    monkeypatch.setenv("VIVACE_DEBUG", "1")
    with pytest.raises(StateError, match=r"blocks\.3\.qkv: its activations hold NaN or infinity at timestep 981, 20"):
        with forward_at(timesteps=[981.0, 20.0]):
            twin(x)
    twin(x[:1])


def test_a_cast_layer_follows_the_weights_of_its_model():
    linear, x = nn.Linear(16, 8).requires_grad_(False), torch.randn(3, 16)
    cast = CastLinear(linear, torch.bfloat16)
    with torch.no_grad():
        low = F.linear(x.bfloat16(), linear.weight.bfloat16(), linear.bias.bfloat16())
    assert error_of(cast(x), low) < 1e-2 and cast(x).dtype == torch.float32
    assert cast(x, torch.bfloat16).dtype == torch.bfloat16
    linear.weight.mul_(2.0)
    assert error_of(cast(x), linear(x)) < 1e-2
    assert list(cast.parameters()) == []


@pytest.fixture(scope="module")
def dit(tiny_folder):
    model = DiT.load(tiny_folder)
    names = [(name, model.get_submodule(name).weight) for name in layer_names(len(model.blocks))]
    t, labels = torch.tensor([500.0, 3.0]), torch.tensor([[1, 2], [10, 10]])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return model, rounded(names, "f", smooth=True), rounded(names, "f", groups=2), (x, t, labels)


def exact(model, weights, x, t, labels, groups=None):
    """The model in float64, its numbers rounded where int8 blocks round them: products' inputs, and in bfloat16."""
    wide = DiT.of(model.config, {name: value.double() for name, value in model.state_dict().items()})
    hidden, modulation = wide.embed(x.double()), wide.condition(t, labels)
    hidden = hidden.repeat(modulation.branches, 1, 1)
    for i, block in enumerate(wide.layers()):
        shift, scale, gate, shift2, scale2, gate2 = modulation.of_block(i)

        def product(part, y, block=block, i=i):
            made = weights.layers[f"blocks.{i}.{part}"]
            given = None if groups is None else made.x_scale[groups][:, None, None]
            return fake(y, made, given) + getattr(block, part).bias

        y = torch.addcmul(shift, F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6), scale)
        qkv = product("qkv", y).bfloat16().unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        hidden = hidden + gate * product("out", y)
        y = torch.addcmul(shift2, F.layer_norm(hidden, hidden.shape[-1:], eps=block.mlp_eps), scale2)
        y = F.gelu(product("up", y), approximate=block.approximate).bfloat16()
        hidden = hidden + gate2 * product("down", y)
    return wide.head(hidden, modulation, tuple(x.shape[2:]))


def test_saying_the_models_own_precision_changes_no_bit(dit):
    model, _, _, call = dit
    standing = stand_in(model, row_of(3, (0, 3, "block", "fp32")), None)
    assert all(torch.equal(*pair) for pair in zip(standing(*call), model(*call), strict=True))
    assert stand_in(model, row_of(3), None) is model


def in_dtype(model, dtype):
    return DiT.of(model.config, {name: value.to(dtype) for name, value in model.state_dict().items()})


@pytest.fixture(scope="module")
def bf16_error(dit):
    """What bfloat16 does to this network, the yardstick for int8 against its own definition in float64."""
    model, _, _, (x, t, labels) = dit
    low = in_dtype(model, torch.bfloat16)(x.bfloat16(), t, labels)
    return error_of(torch.cat(low), torch.cat(in_dtype(model, torch.float64)(x.double(), t, labels)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_int8_blocks_compute_what_their_numbers_say(dit, bf16_error, dtype):
    model, weights, _, (x, t, labels) = dit
    out = stand_in(in_dtype(model, dtype), row_of(3, (0, 3, "block", "int8")), weights)(x.to(dtype), t, labels)
    assert out[0].dtype == dtype
    assert error_of(torch.cat(out), torch.cat(exact(model, weights, x, t, labels))) < bf16_error


def test_a_bfloat16_model_loses_no_more_than_bfloat16_and_int8_do(dit, bf16_error):
    model, weights, _, (x, t, labels) = dit
    plain = torch.cat(in_dtype(model, torch.float64)(x.double(), t, labels))
    int8_error = error_of(torch.cat(exact(model, weights, x, t, labels)), plain)
    standing = stand_in(in_dtype(model, torch.bfloat16), row_of(3, (0, 3, "block", "int8")), weights)
    out = standing(x.bfloat16(), t, labels)
    assert out[0].dtype == torch.bfloat16 and error_of(torch.cat(out), plain) < 2 * (bf16_error + int8_error)


def test_static_activations_in_a_batch_of_two_times(dit, bf16_error):
    model, _, weights, (x, t, labels) = dit
    standing = stand_in(model, row_of(3, (0, 3, "block", "int8")), weights)
    groups = torch.tensor([weights.group_of(time) for time in t.tolist()] * 2)
    assert groups.tolist() == [1, 0, 1, 0]
    with forward_at(t.tolist(), groups):
        out = standing(x, t, labels)
    assert error_of(torch.cat(out), torch.cat(exact(model, weights, x, t, labels, groups))) < bf16_error
    with forward_at([500.0], torch.tensor([1, 1])):
        alone = standing(x[:1], t[:1], labels[:, :1])
    assert all(torch.equal(whole[:1], one) for whole, one in zip(out, alone, strict=True))


def test_rules_reach_the_blocks_and_halves_they_name(dit):
    model, weights, _, call = dit
    plain = torch.cat(model(*call))
    rows = {
        rule: torch.cat(stand_in(model, row_of(3, rule), weights)(*call))
        for rule in (
            (0, 3, "block", "int8"),
            (0, 3, "attn", "int8"),
            (0, 3, "mlp", "int8"),
            (1, 2, "block", "int8"),
            (1, 2, "block", "bf16"),
        )
    }
    assert all(not torch.equal(out, plain) for out in rows.values())
    assert len({out.numpy().tobytes() for out in rows.values()}) == len(rows)
    mixed = row_of(3, (0, 3, "block", "int8"), (0, 3, "mlp", "fp32"))
    attention = stand_in(model, mixed, weights)(*call)
    assert torch.equal(torch.cat(attention), rows[0, 3, "attn", "int8"])


def test_layers_that_are_kept_high_run_in_bfloat16(dit):
    model, weights, _, call = dit
    some = replace(weights, layers={name: layer for name, layer in weights.layers.items() if name[:8] == "blocks.2"})
    row = (0, 2, "block", "bf16"), (2, 3, "block", "int8")
    int8, mixed = (stand_in(model, row_of(3, *rows), some)(*call) for rows in (((0, 3, "block", "int8"),), row))
    assert torch.equal(torch.cat(int8), torch.cat(mixed))


def test_a_row_of_which_nothing_is_held_is_refused(dit):
    model, weights, _, _ = dit
    with pytest.raises(UnsupportedError, match="hold no linear"):
        stand_in(model, row_of(3, (0, 3, "block", "int8")), replace(weights, layers={}))


def test_a_sample_has_the_same_bits_alone_and_in_a_batch(dit):
    model, weights, _, (x, t, labels) = dit
    for dtype, precision in ((torch.float32, "int8"), (torch.bfloat16, "int8"), (torch.bfloat16, "fp32")):
        standing = stand_in(in_dtype(model, dtype), row_of(3, (0, 2, "block", precision)), weights)
        both, one = standing(x.to(dtype), t, labels), standing(x[1:].to(dtype), t[1:], labels[:, 1:])
        assert all(torch.equal(whole[1:], alone) for whole, alone in zip(both, one, strict=True))


def test_stand_ins_leave_the_model_alone_and_follow_its_weights(dit):
    model, weights, _, call = dit
    before = torch.cat(model(*call))
    own = DiT.of(model.config, {name: value.clone() for name, value in model.state_dict().items()})
    standing = stand_in(own, row_of(3, (0, 1, "block", "int8")), weights)
    first = torch.cat(standing(*call))
    assert torch.equal(torch.cat(model(*call)), before) and isinstance(standing, DiT)
    with torch.no_grad():
        own.final.weight.mul_(0.0)
    assert not torch.equal(torch.cat(standing(*call)), first)


def test_precisions_without_weights_are_refused(dit):
    model, weights, _, _ = dit
    with pytest.raises(UnsupportedError, match="int8: the model was loaded without int8 weights"):
        stand_in(model, row_of(3, (0, 1, "attn", "int8")), None)
    with pytest.raises(UnsupportedError, match="fp8: the model was loaded without fp8 weights"):
        stand_in(model, row_of(3, (0, 1, "attn", "fp8")), weights)
