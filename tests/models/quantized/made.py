"""Quantized weights for tests: random ones, and plain rounding of a network's linear layers."""

import torch

from vivace.models.quantized.weights import QuantizedLayer, QuantizedWeights


def layer(columns, depth, *, format="int8", smooth=False, groups=0, seed=0):
    """A random layer; groups 0: activations by token."""
    generator = torch.Generator().manual_seed(seed + columns * depth)
    numbers = torch.randint(-127, 128, (columns, depth), generator=generator)
    weight = numbers.to(torch.int8) if format == "int8" else (numbers / 16).to(torch.float8_e4m3fn)

    def positive(size):
        return torch.rand(size, generator=generator) + 0.5

    return QuantizedLayer(
        weight,
        positive(columns) / 1000,
        positive(depth) if smooth else None,
        positive(groups) / 10 if groups else None,
    )


def weights(format="int8"):
    """Two layers that use everything a file can hold."""
    layers = {
        "blocks.0.qkv": layer(12, 4, format=format, smooth=True, groups=3),
        "blocks.0.out": layer(4, 4, format=format),
    }
    return QuantizedWeights(
        format,
        "a" * 64,
        layers,
        edges=(250.0, 500.5),
        kept={"blocks.0.up": "sensitive"},
        advice={"first": 1, "last": 1, "high": "bf16"},
        source={"recipe": {"rounding": "nearest"}, "calibration": "0" * 64},
    )


def rounded(named, fingerprint, *, smooth=False, groups=0):
    """int8 by plain rounding of (name, weight [N, K]) pairs, with factors that are powers of two where smooth."""
    layers = {}
    for seed, (name, weight) in enumerate(named):
        factor = torch.ones(weight.shape[1])
        if smooth:
            generator = torch.Generator().manual_seed(seed)
            factor = 2.0 ** torch.randint(-1, 2, (weight.shape[1],), generator=generator)
        w = weight.detach().float() / factor
        scale = w.abs().amax(1) / 127
        q = (w / scale[:, None]).round().to(torch.int8)
        x_scale = torch.linspace(0.02, 0.05, groups) if groups else None
        layers[name] = QuantizedLayer(q, scale, factor if smooth else None, x_scale)
    edges = tuple(float(1000 * i) / groups for i in range(1, groups)) if groups else ()
    return QuantizedWeights("int8", fingerprint, layers, edges=edges)


def same(one, two):
    """Equal in every field and bit."""
    plain = ("format", "fingerprint", "edges", "kept", "advice")
    fields = all(getattr(one, name) == getattr(two, name) for name in plain)
    return (
        fields
        and list(one.layers) == list(two.layers)
        and all(
            a.tensors.keys() == b.tensors.keys()
            and all(
                torch.equal(a.tensors[part].view(torch.uint8), b.tensors[part].view(torch.uint8)) for part in a.tensors
            )
            for a, b in zip(one.layers.values(), two.layers.values(), strict=True)
        )
    )
