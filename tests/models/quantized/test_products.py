"""Ours and oneDNN's int8 products: the same bits, one choice a shape, kept on disk."""

import pytest
import torch
from tests.models.quantized.made import layer

from vivace.kernels import store
from vivace.models.quantized import products
from vivace.models.quantized.layers import QuantizedLinear
from vivace.models.quantized.products import ONEDNN, OURS, Int8Products, OneDnnProduct
from vivace.models.quantized.weights import QuantizedLayer

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN; install a build of it that does"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(48, 1152, 37), (7, 5, 3), (1, 1, 1), (130, 67, 40), (64, 4608, 16)], ids=str)
@pytest.mark.parametrize("extreme", [False, True])
def test_both_give_the_same_bits(dtype, sizes, extreme):
    columns, depth, tokens = sizes
    made = layer(columns, depth, smooth=not extreme)
    x = torch.randn(2, tokens, depth, generator=torch.Generator().manual_seed(0)).to(dtype)
    if extreme:  # the largest sums, beyond what float32 counts exactly
        made = QuantizedLayer(torch.full((columns, depth), -128, dtype=torch.int8), made.weight_scale)
        x = torch.ones_like(x)
    x[0, 0, 0] = torch.nan
    for bias in (None, torch.randn(columns)):
        ours, theirs = (QuantizedLinear("x", made, bias) for _ in range(2))
        theirs.product = OneDnnProduct(made, tokens)
        assert torch.equal(ours(x).view(torch.uint8), theirs(x).view(torch.uint8)) or torch.equal(
            ours(x).nan_to_num(0.5), theirs(x).nan_to_num(0.5)
        )


def test_a_choice_is_made_once_a_shape_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def measured(made, rows, dtype):
        calls.append((tuple(made.weight.shape), rows))
        return {"way": ONEDNN if made.weight.shape[0] > 8 else OURS, "ms": {OURS: 2.0, ONEDNN: 1.0}}

    monkeypatch.setattr(products, "measured", measured)
    for _ in range(2):
        chosen = Int8Products(32)
        for _ in range(2):
            large = chosen.layer("a", layer(16, 8), None, torch.float32)
            small = chosen.layer("b", layer(8, 8), None, torch.float32)
        assert isinstance(large.product, OneDnnProduct) and not isinstance(small.product, OneDnnProduct)
        assert chosen.report() == {
            "16 x 8": f"{ONEDNN}, takes 2.00 ms by {OURS}, 1.00 ms by {ONEDNN}",
            "8 x 8": f"{OURS}, takes 2.00 ms by {OURS}, 1.00 ms by {ONEDNN}",
        } or set(chosen.report()) == {"16 x 8", "8 x 8"}
    assert calls == [((16, 8), 32), ((8, 8), 32)]
    Int8Products(33).layer("a", layer(16, 8), None, torch.float32)
    assert calls[2:] == [((16, 8), 33)]


def test_oneDNN_is_taken_only_when_it_is_clearly_faster(monkeypatch):
    made, clock = layer(8, 8), iter(range(10**6))
    monkeypatch.setattr(products.time, "perf_counter", lambda: next(clock) * 1e-3)
    found = products.measured(made, 16, torch.float32)
    assert found["way"] == OURS and found["ms"][OURS] == pytest.approx(found["ms"][ONEDNN])


def test_depths_that_overflow_run_ours():
    chosen = Int8Products(16)
    deep = chosen.layer("x", layer(2, products.MOST_DEPTH + 1), None, torch.float32)
    assert not isinstance(deep.product, OneDnnProduct) and "the only one here" in next(iter(chosen.report().values()))


def test_what_is_kept_may_be_nonsense(monkeypatch):
    monkeypatch.setattr(store, "get", lambda key: store.Found({"way": "magic"}, "kept"))
    chosen = Int8Products(16)
    chosen.layer("x", layer(8, 8), None, torch.float32)
    assert chosen.chosen["8 x 8"]["way"] in (OURS, ONEDNN)
