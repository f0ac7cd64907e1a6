"""The native DiT as a fixed sequence of ops: the network's predictions, in memory planned beforehand."""

import copy
import gc

import pytest
import torch
from tests.engine.recording import address
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vivace.kernels.spec import within_tolerance
from vivace.models.compiled.hoist import modulation_table
from vivace.models.compiled.linears import ACTIVATIONS, PLAIN, OurLinears, Rows, Then, TorchLinears, packable
from vivace.models.compiled.sequence import DitSequence
from vivace.models.dit import DiT

TIMES, LABELS, N = [999.0, 500.0, 741.5, 20.0, 3.25], [4, 10], 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Told(TorchLinears):
    """Torch's linears without packing, with gate and residual: what a library of products that take them would do."""

    gated, how = True, "told"

    def __init__(self, device, dtype):
        self.packs = False

    def prepare(self, layer):
        plain = super().prepare(layer)

        def call(x, out, then=PLAIN):
            made = plain(x, out.like(torch.empty_like(out.padded)), Then(then.approximate)).tokens
            made = made if then.gate is None else made.float().mul(then.gate[:, None]).to(made.dtype)
            out.tokens.copy_(made if then.residual is None else then.residual.tokens + made)
            return out

        return call


class Makers(TorchDispatchMode):
    """Names of the ops that return memory which none of their inputs has."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        if any(isinstance(made, torch.Tensor) and address(made) not in given for made in tree_leaves(out)):
            self.names.append(func.overloadpacket.__name__)
        return out


class Case:
    """A model, five samples of it, and its predictions for both branches."""

    def __init__(self, folder, dtype, size):
        self.model = DiT.load(folder, dtype)
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(N, 4, *size, generator=g).to(dtype)
        table = modulation_table(self.model, TIMES, LABELS)
        self.modulation = table.transpose(0, 1)  # [B, n, 6L + 2, D]
        self.positions = self.model._positions_at((size[0] // 2, size[1] // 2))
        self.sequence = DitSequence(self.model)
        self.whole = [out.clone() for out in self.run(range(N))]

    def run(self, samples, branches=(0, 1), sequence=None):
        samples = list(samples)
        rows = self.modulation[list(branches)][:, samples].flatten(0, 1)
        return (sequence or self.sequence).run(self.x[samples], rows, self.positions, len(branches))


@pytest.fixture(scope="module", params=[(8, 8), (6, 10)], ids=["16 tokens", "15 tokens"])
def size(request):
    return request.param


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def case(request, tiny_folder, size):
    return Case(tiny_folder, request.param, size)


def agrees(case, sequence):
    """||error|| <= 2 ||eager error|| over forty predictions; the largest error is one sample's and says little."""
    exact, found = copy.deepcopy(case.model).double(), ([], [], [])
    labels = torch.tensor(LABELS)[:, None].expand(2, N)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        x, times = torch.randn(case.x.shape, generator=g).to(case.x.dtype), 999 * torch.rand(N, generator=g).double()
        table = modulation_table(case.model, times.tolist(), LABELS)
        found[0].extend(out.clone() for out in sequence.run(x, table.transpose(0, 1).flatten(0, 1), case.positions, 2))
        found[1].extend(case.model(x, times, labels))
        found[2].extend(exact(x.double(), times, labels))
    mine, eager, truth = (torch.cat(outs).double() for outs in found)
    assert float((mine - truth).norm()) <= 2 * float((eager - truth).norm())


def test_it_agrees_with_the_network(case):
    assert all(out.shape == case.x.shape and out.dtype == case.x.dtype for out in case.whole)
    agrees(case, case.sequence)


def test_in_float64_it_agrees_to_the_last_digits(tiny_folder, size):
    case = Case(tiny_folder, torch.float64, size)
    labels = torch.tensor(LABELS)[:, None].expand(2, N)
    for out, truth in zip(case.whole, case.model(case.x, torch.tensor(TIMES), labels), strict=True):
        assert float((out - truth).norm() / truth.norm()) < 1e-13


def test_linears_that_take_gate_and_residual_agree_too(case):
    agrees(case, DitSequence(case.model, Told(case.model.device, case.model.dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_linears_agree_and_keep_a_samples_bits(tiny_folder, size, dtype):
    case = Case(tiny_folder, dtype, size)
    sequence = DitSequence(case.model, OurLinears(case.model.device))
    agrees(case, sequence)
    whole = [out.clone() for out in case.run(range(N), sequence=sequence)]
    for samples in ([0], [4, 1, 0]):
        outs = case.run(samples, sequence=sequence)
        assert all(torch.equal(out, both[samples]) for out, both in zip(outs, whole, strict=True))


@pytest.mark.parametrize("count", [1, 2])
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(case, threads, count):
    threads(count)
    for samples in ([0], [3], [2, 3], [4, 1, 0]):
        outs = case.run(samples)
        assert all(torch.equal(out, whole[samples]) for out, whole in zip(outs, case.whole, strict=True))
        assert torch.equal(case.run(samples, [1])[0], case.whole[1][samples])


def test_a_run_repeats_itself_over_what_another_left_behind(case):
    arena = case.sequence.arena(2 * N, case.positions.shape[0])
    rows = case.modulation.flatten(0, 1)
    for _ in range(2):
        case.sequence.run(torch.full_like(case.x, float("nan")), rows, case.positions, 2, arena)
        outs = case.sequence.run(case.x, rows, case.positions, 2, arena)
        assert all(torch.equal(out, whole) for out, whole in zip(outs, case.whole, strict=True))
        assert outs[0].data_ptr() == arena.out.data_ptr()


def test_memory_of_one_size_is_shared_and_goes_with_its_holders(case):
    arena = case.sequence.arena(2, 16)
    assert case.sequence.arena(2, 16) is arena and case.sequence.arena(4, 16) is not arena
    width, itemsize = case.model.config.width, case.x.element_size()
    rows = 2 * 16 * (width * (1 + 1 + 3 + 1 + 1 + 4 + 1) + 4 * 4 + 4 * 8) + 2 * 16 * 4 * 4
    assert arena.nbytes == rows * itemsize
    del arena
    gc.collect()
    assert (2, 16) not in case.sequence._arenas


@pytest.mark.parametrize("packs", [True, False])
def test_nothing_is_allocated_where_an_op_can_be_told_where_to_write(tiny_folder, packs):
    """Only products of oneDNN and attention bring memory of their own."""
    case = Case(tiny_folder, torch.float32, (8, 8))
    linears = TorchLinears(case.model.device, torch.float32)
    linears.packs = packs
    sequence = DitSequence(case.model, linears)
    arena = sequence.arena(2 * N, 16)
    rows = case.modulation.flatten(0, 1)
    sequence.run(case.x, rows, case.positions, 2, arena)
    with Makers() as makers:
        sequence.run(case.x, rows, case.positions, 2, arena)
    names = {"_scaled_dot_product_flash_attention_for_cpu"} | ({"_linear_pointwise"} if packs else set())
    assert set(makers.names) == names
    assert makers.names.count("_linear_pointwise") == (2 + 4 * case.model.config.layers if packs else 0)


def test_products_are_prepacked_where_onednn_has_them():
    assert packable(torch.float32) == torch.backends.mkldnn.is_available() and not packable(torch.float64)
    for dtype in DTYPES:
        linears = TorchLinears(torch.device("cpu"), dtype)
        assert linears.packs == packable(dtype) and linears.how.startswith("torch") and not linears.gated
    assert not TorchLinears(torch.device("cuda"), torch.float32).packs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", [None, "none", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_layer_of_torch(dtype, approximate, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 80, bias=bias, dtype=dtype).requires_grad_(False)
    x, out = (Rows.of(torch.zeros(32, width, dtype=dtype), 3, 9) for width in (48, 80))
    x.tokens.normal_()

    def plain(layer, x):
        y = layer(x)
        return y if approximate is None else torch.nn.functional.gelu(y, approximate=approximate)

    made = TorchLinears(torch.device("cpu"), dtype).prepare(layer)(x, out, Then(approximate))
    exact = plain(copy.deepcopy(layer).double(), x.tokens.double())
    holds, error, bound = within_tolerance(made.tokens, plain(layer, x.tokens), exact)
    assert holds, (error, bound)
    assert made.padded.shape == (32, 80) and made.tokens.shape == (3, 9, 80)
    assert approximate in ACTIVATIONS
