"""oneDNN's int8 product is taken only where its sums are exact: some processors add pairs in 16 bits and saturate."""

import os
import subprocess
import sys

import torch

from vivace.models.quantized import products
from vivace.models.quantized.products import OURS, Int8Products, exact_here
from vivace.models.quantized.weights import QuantizedLayer

ASK = "from vivace.models.quantized.products import exact_here; print(exact_here())"


def test_a_processor_that_saturates_is_found_out():
    old = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "VIVACE_CPU_ISA": "avx2"}
    told = subprocess.run([sys.executable, "-c", ASK], env=old, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_where_sums_are_not_exact_ours_runs_whatever_the_clock_says(monkeypatch):
    exact_here.cache_clear()
    monkeypatch.setattr(products, "exact_here", lambda: False)
    monkeypatch.setattr(products, "measured", lambda *_: {"way": products.ONEDNN, "ms": {}})
    layer = QuantizedLayer(torch.ones(16, 32, dtype=torch.int8), torch.ones(16))
    chosen = Int8Products(16)
    assert not isinstance(chosen.layer("a", layer, None, torch.float32).product, products.OneDnnProduct)
    assert chosen.report() == {"16 x 32": f"{OURS}, the only one here"}
