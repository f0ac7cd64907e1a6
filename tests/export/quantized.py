"""Static quantized weights of small networks, with ranges that one forward of them measured."""

from dataclasses import replace

import torch

from vivace.models.quantized.formats import codes, most_of, scale_of, stored
from vivace.models.quantized.plain import round_layers
from vivace.models.quantized.reach import denoiser_of, network_of, with_linears


def static_weights(pipe, format="int8", *, smooth=False, groups=1):
    """Weights of all linears in the blocks of a native DiT; of several groups the last has the widest range."""
    rounded = round_layers(pipe, format=format)
    denoiser = denoiser_of(pipe)
    network, most = network_of(denoiser), {}

    def measuring(name, linear):
        def forward(x):
            most[name] = max(most.get(name, 0.0), float(x.abs().max()))
            return torch.nn.functional.linear(x, linear.weight, linear.bias)

        return forward

    calls = {name: measuring(name, network.get_submodule(name)) for name in rounded.layers}
    config = network.config
    x = torch.randn(2, config.channels, config.size, config.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network_of(with_linears(denoiser, calls))(x, torch.tensor([700.0, 100.0]), torch.tensor([[1, 2]]))
    layers = {}
    for seed, (name, layer) in enumerate(rounded.layers.items()):
        scales = torch.linspace(0.5, 1.0, groups) if groups > 1 else torch.ones(1)
        made = replace(layer, x_scale=most[name] / most_of(format) * scales)
        if smooth:
            factor = 2.0 ** torch.randint(
                -1, 2, (layer.weight.shape[1],), generator=torch.Generator().manual_seed(seed)
            )
            weight = network.get_submodule(name).weight.detach() / factor
            scale = scale_of(weight.abs().amax(1), format)
            weight = stored(codes(weight, scale[:, None], format), format)
            made = replace(made, weight=weight, weight_scale=scale, smooth=factor, x_scale=2 * made.x_scale)
        layers[name] = made
    edges = tuple(1000.0 * i / groups for i in range(1, groups))
    return replace(rounded, layers=layers, edges=edges)
