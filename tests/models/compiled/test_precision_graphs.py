"""Rows of the native DiT in other precisions as pieces that a graph replays, on stand-ins for CUDA: int8 and fp8."""

import pytest
import torch
from tests.models.compiled.test_graph_sessions import SCHEDULER, run, session
from tests.models.compiled.test_precisions import EDGES, LABELS, TIMES, N, error, smoothed

import vivace
from vivace.engine.compiled import Evaluation
from vivace.engine.denoiser import predictions
from vivace.engine.passes import apply_precision
from vivace.models.class_denoiser import ClassDenoiser
from vivace.models.compiled.hoist import modulation_table
from vivace.models.compiled.replay import DitReplay
from vivace.models.compiled.sequence import DitSequence
from vivace.models.dit import DiT
from vivace.models.load import load as load_model
from vivace.models.quantized.layers import forward_at
from vivace.models.quantized.native import PreciseDiT
from vivace.models.quantized.weights import QuantizedLayer, QuantizedWeights


def eight_bit_floats(model, static=False):
    """fp8 weights with the smoothing and the scales of the int8 ones."""
    int8 = smoothed(model, static)
    layers = {}
    for name, layer in int8.layers.items():
        weight = layer.dequantized() / layer.smooth
        scale = weight.abs().amax(1) / 448
        x_scale = None if layer.x_scale is None else layer.x_scale * 127 / 448
        layers[name] = QuantizedLayer((weight / scale[:, None]).to(torch.float8_e4m3fn), scale, layer.smooth, x_scale)
    return QuantizedWeights("fp8", "", layers, int8.edges, int8.kept)


class Sequenced(ClassDenoiser):
    """The native DiT whose `evaluate` is the forward of its pieces."""

    def __init__(self, model, quantized):
        super().__init__(model, quantized)
        self.replay = DitReplay(
            model.module, lambda match, b: match.id if b == "cond" else model.classes, quantized=quantized
        )

    def evaluate(self, x, timesteps, conditions, variant):
        lanes = tuple(range(len(x)))
        call = Evaluation(x, lanes, lanes, tuple(timesteps), tuple(conditions), (None,) * len(x))
        pieces = self.replay.stage(call, variant)
        joined = [{name: torch.cat(parts) for name, parts in piece.inputs.items()} for piece in pieces]
        results = [piece.forward(inputs).clone() for piece, inputs in zip(pieces, joined, strict=True)]
        return predictions(pieces, results, len(variant.branches), len(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("hoist", [True, False])
def test_int8_rows_through_graphs_have_the_bits_of_eager(tiny_folder, dtype, static, hoist):
    model = load_model(tiny_folder, dtype=dtype, scheduler=SCHEDULER)
    native = Sequenced(model, smoothed(model.module, static))
    schedule = vivace.NoiseSchedule.from_diffusers(SCHEDULER)
    plain = vivace.make_plan(schedule, steps=4, prediction="eps")
    mixed = apply_precision(plain, "int8", last=1, high="bf16")
    guided = apply_precision(vivace.passes.apply_guidance(plain, 2.0), "int8", site="mlp")
    made = (plain, mixed, guided)
    requests = [vivace.Request(k, plan=plan, n=1 + k % 2, seed=k) for k, plan in enumerate(made)]
    graphs = session(native, native.replay, *made, hoist=hoist)
    eager = session(native, native.replay, *made, graphs=False)
    together, wanted = run(graphs, requests), run(eager, requests)
    for mine, theirs, request in zip(together, wanted, requests, strict=True):
        assert torch.equal(mine.latents, theirs.latents)
        assert torch.equal(run(graphs, [request])[0].latents, theirs.latents)
    report = graphs.executor.report()
    assert "not_captured" not in report and report["int8"] == native.replay.quantized.nbytes
    before = graphs.executor.compiles
    run(graphs, [vivace.Request(3, plan=apply_precision(plain, "int8", first=2, high="bf16"), seed=9)])
    assert graphs.executor.compiles == before


def test_a_graph_holds_the_quantized_weights(tiny_folder):
    model = DiT.load(tiny_folder)
    weights = smoothed(model)
    held = {tensor.data_ptr() for tensor in DitReplay(model, lambda *_: 0, quantized=weights).weights()}
    assert {layer.weight.data_ptr() for layer in weights.layers.values()} <= held


KINDS = (("fp8", "fp8"), (None, "fp8"), ("fp8", "bf16"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [smoothed, eight_bit_floats])
@pytest.mark.parametrize("static", [False, True])
def test_a_sequence_errs_no_more_than_twice_the_definition_in_either_format(tiny_folder, dtype, make, static):
    model = DiT.load(tiny_folder, dtype)
    weights = make(model, static)
    kinds = tuple(tuple(weights.format if name == "fp8" else name for name in pair) for pair in KINDS)
    x = torch.randn(N, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    labels, times = torch.tensor(LABELS)[:, None].expand(2, N), torch.tensor(TIMES, dtype=torch.float64)
    groups = [weights.group_of(time) for time in TIMES]
    sequence = DitSequence(model, None, kinds, weights)
    given = None
    if static:
        from vivace.models.compiled.scales import scale_table

        given = scale_table(weights, kinds)[groups * 2].flatten(1)
        assert weights.edges == EDGES and given.shape == (2 * N, 12)
    rows = modulation_table(model, TIMES, LABELS).transpose(0, 1).flatten(0, 1)
    outs = [out.clone() for out in sequence.run(x, rows, model._positions_at((4, 4)), 2, None, given)]
    with forward_at(TIMES, torch.tensor(groups * 2)):
        plain = PreciseDiT.standing_for(model, kinds, weights.layers)(x, times, labels)
    exact = DiT.load(tiny_folder, torch.float64)(x.double(), times, labels)
    assert error(outs, exact) <= 2 * error(plain, exact) + torch.finfo(dtype).eps / 2
    one = sequence.run(
        x[3:4], rows[[3, N + 3]], model._positions_at((4, 4)), 2, None, None if given is None else given[[3, N + 3]]
    )
    assert all(torch.equal(alone[0], both[3]) for alone, both in zip(one, outs, strict=True))
