"""Rows of the native DiT in other precisions than the model's, both ways: agreement, bits, static scales, faults."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from vivace import _C
from vivace.engine.compiled import Bucket
from vivace.engine.plan import Rule, Variant
from vivace.models.compiled import precisions
from vivace.models.compiled.cpp_row import CLOCKED, CppRow, Memory
from vivace.models.compiled.hoist import modulation_table
from vivace.models.compiled.sequence_row import SequenceRow
from vivace.models.dit import DiT
from vivace.models.quantized.layers import forward_at
from vivace.models.quantized.native import PreciseDiT
from vivace.models.quantized.weights import QuantizedLayer, QuantizedWeights

TIMES, LABELS, N = [999.0, 500.0, 741.5, 20.0, 3.25], [4, 10], 5
EDGES = (100.0, 600.0)
WAYS = {"cpp": CppRow, "sequence": SequenceRow}
KINDS = {
    "int8": (("int8", "int8"),) * 3,
    "mixed": ((None, "int8"), ("int8", "bf16"), ("fp32", None)),
    "bf16": (("bf16", "bf16"),) * 3,
    "fp32": (("fp32", "bf16"), ("fp32", "fp32"), (None, None)),
}


def smoothed(model, static=False):
    """int8 weights with smoothing, one linear kept high; static: scales by timestep group for the first two blocks."""
    layers, g = {}, torch.Generator().manual_seed(0)
    for name, layer in precisions.nearest(model).layers.items():
        smooth = torch.rand(layer.weight.shape[1], generator=g) + 0.5
        weight = layer.dequantized() / smooth
        scale = weight.abs().amax(1) / 127
        x_scale = torch.tensor([0.05, 0.08, 0.03]) if static and name[7] in "01" else None
        layers[name] = QuantizedLayer((weight / scale[:, None]).round().to(torch.int8), scale, smooth, x_scale)
    kept = {"blocks.1.out": "as asked"}
    layers.pop("blocks.1.out")
    return QuantizedWeights("int8", "", layers, EDGES if static else (), kept)


class Case:
    """A model, five samples of it, and a row of each way."""

    def __init__(self, folder, dtype, kinds, static=False):
        self.model, self.kinds = DiT.load(folder, dtype), kinds
        self.quantized = smoothed(self.model, static)
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(N, 4, 6, 10, generator=g).to(dtype)
        self.table = modulation_table(self.model, TIMES, LABELS)
        self.groups = [self.quantized.group_of(time) for time in TIMES]
        self.rows = {way: make(self.model, kinds, self.quantized) for way, make in WAYS.items()}

    def run(self, way, lanes=range(N), branches=(0, 1), **options):
        lanes, row = list(lanes), self.rows[way]
        row.reserve(len(branches), Bucket(15, len(lanes)))
        picks = [[(lane, branch) for branch in branches] for lane in lanes]
        tables, groups = [self.table] * len(lanes), [self.groups[lane] for lane in lanes]
        return [out.clone() for out in row.run(self.x, lanes, tables, picks, groups, **options)]

    def defined(self):
        """The plain definition, and the network in float64 without any rounding of precisions."""
        own = [precisions.own_precisions(pair, self.model.dtype) for pair in self.kinds]
        stand_in = PreciseDiT.standing_for(self.model, own, self.quantized.layers)
        labels = torch.tensor(LABELS)[:, None].expand(2, N)
        with forward_at(TIMES, torch.tensor(self.groups * 2)):
            plain = stand_in(self.x, torch.tensor(TIMES, dtype=torch.float64), labels)
        exact = copy.deepcopy(self.model).double()
        return plain, exact(self.x.double(), torch.tensor(TIMES, dtype=torch.float64), labels)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=KINDS)
def case(request, tiny_folder, dtype):
    return Case(tiny_folder, dtype, KINDS[request.param], static=request.param == "mixed")


def error(outs, exact):
    mine, truth = torch.cat(list(outs)).double(), torch.cat(list(exact))
    return float((mine - truth).norm() / truth.norm())


@pytest.mark.parametrize("way", WAYS)
def test_a_row_errs_no_more_than_twice_the_definition(case, way):
    plain, exact = case.defined()
    floor = torch.finfo(torch.bfloat16).eps / 2 if case.model.dtype == torch.bfloat16 else 2**-24
    assert error(case.run(way), exact) <= 2 * error(plain, exact) + floor


@pytest.mark.parametrize("way", WAYS)
def test_a_row_in_int8_is_nearer_to_its_definition_than_to_the_network(tiny_folder, dtype, way):
    case = Case(tiny_folder, dtype, KINDS["int8"])
    plain, exact = case.defined()
    assert 0.0 < error(case.run(way), [out.double() for out in plain]) < error(plain, exact)


@pytest.mark.parametrize("way", WAYS)
def test_a_sample_has_the_same_bits_in_any_company_on_any_lane_and_thread(case, threads, way):
    whole = case.run(way)
    for count in (1, 2):
        threads(count)
        for lanes in ([0], [3], [4, 1, 0]):
            outs = case.run(way, lanes)
            assert all(torch.equal(out, both[lanes]) for out, both in zip(outs, whole, strict=True))
            assert torch.equal(case.run(way, lanes, [1])[0], whole[1][lanes])


@pytest.mark.parametrize("way", WAYS)
def test_static_scales_are_those_of_the_samples_timestep_group(tiny_folder, dtype, way):
    case = Case(tiny_folder, dtype, KINDS["int8"], static=True)
    assert sorted(set(case.groups)) == [0, 1, 2]
    outs = case.run(way)
    case.groups = [0] * N
    others = case.run(way)
    for sample, time in enumerate(TIMES):
        same = torch.equal(outs[0][sample], others[0][sample])
        assert same == (time < EDGES[0])


def test_rows_that_share_memory_do_not_disturb_each_other(tiny_folder, dtype):
    case = Case(tiny_folder, dtype, KINDS["int8"])
    alone, memory = case.run("cpp"), Memory()
    rows = [CppRow(case.model, kinds, case.quantized, memory) for kinds in KINDS.values()]
    for row in rows:
        case.rows["cpp"] = row
        case.run("cpp")
    case.rows["cpp"] = rows[0]
    assert all(torch.equal(a, b) for a, b in zip(case.run("cpp"), alone, strict=True))


def test_packed_layers_are_shared_between_precisions_and_none_is_packed_in_vain(tiny_folder, dtype):
    case = Case(tiny_folder, dtype, KINDS["int8"])
    kinds = (("int8", "int8"), ("int8", "int8"), (None, None))
    all_int8, own = case.rows["cpp"].weights.layers, str(dtype).removeprefix("torch.")
    floats = {name for name in all_int8 if not name.endswith("int8")}
    assert floats == {f"patches {own}", f"final {own}", "blocks.1.out bfloat16"}
    partly = CppRow(case.model, kinds, case.quantized).weights.layers
    shared = {name for name in partly if name in all_int8 and partly[name].weight is all_int8[name].weight}
    assert len(shared) == 2 + 8 and len(partly) == 2 + 12


@pytest.mark.parametrize("way", WAYS)
def test_a_check_names_the_linear_and_the_sample(case, way):
    assert case.run(way, check=True) is not None and case.rows[way].fault is None
    case.table[2, 1, 6 * 2 + 4, 3] = float("inf")  # of the third block's MLP, of one sample and branch
    try:
        case.run(way, check=True)
        assert case.rows[way].fault == ("blocks.2.up", 2)
        case.run(way)
        assert case.rows[way].fault is None
    finally:
        case.table[2, 1, 6 * 2 + 4, 3] = 0.0
    case.table.copy_(modulation_table(case.model, TIMES, LABELS))


def test_the_clock_counts_every_kind_of_stage(tiny_folder):
    case = Case(tiny_folder, torch.float32, KINDS["int8"])
    case.run("cpp", clock=True)
    assert len(case.rows["cpp"].clocked) == len(CLOCKED) and all(time > 0 for time in case.rows["cpp"].clocked)


def test_why_a_precision_cannot_run(tiny_folder):
    model = DiT.load(tiny_folder)
    weights = smoothed(model)

    def reason(quantized, *rules):
        return precisions.why_not(model, Variant(rules=rules), quantized)

    assert reason(None, Rule((0, 3), precision="bf16")) is None and reason(weights) is None
    assert reason(weights, Rule((0, 2), "mlp", precision="int8")) is None
    assert reason(None, Rule((0, 3), precision="int8")) == "the model was loaded without int8 weights"
    assert reason(weights, Rule((0, 3), precision="fp8")) == "fp8 has kernels on CUDA only"
    assert "site 'cross_attn'" in reason(weights, Rule((0, 3), "cross_attn", precision="int8"))
    foreign = QuantizedWeights("int8", "", {"transformer_blocks.0.ff": next(iter(weights.layers.values()))})
    assert "hold no linear of the blocks" in reason(foreign, Rule((0, 3), precision="int8"))


@pytest.mark.parametrize("isa", sorted({"scalar", "avx2"} & set(_C.available_isas())))
def test_all_of_this_holds_on_every_instruction_set(isa):
    env = {**os.environ, "VIVACE_CPU_ISA": isa}
    options = ["-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", "not on_every_instruction_set"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:]
