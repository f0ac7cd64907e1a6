"""What of a DiT's rows does not depend on x: the modulation vectors of a whole plan, made before its loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vivace.kernels.linear import PackedWeight, pack_weight
from vivace.kernels.linear import linear as our_linear
from vivace.kernels.spec import CPU, missing
from vivace.models.compiled.packs import kept
from vivace.models.dit import DiT
from vivace.models.rowwise import linear, silu

KEPT = 16  # plans whose timestep embeddings are kept


@torch.no_grad()
def modulation_table(model: DiT, timesteps: Sequence[float], labels: Sequence[int], *, keep: bool = True) -> Tensor:
    """table[s, b] = modulation of the whole network at timesteps[s] for the class labels[b].

    One product a layer for all rows and branches, written into the table. A row's bits do not depend on how many there
    are. On the CPU the weights are packed once and kept beside the model, a third of its size.

    Args:
        timesteps: what the network is fed, S numbers in units of the training schedule.
        labels: class ids, B of them; `config.classes` is the null label.
        keep: what depends on timesteps alone is kept beside the model for the next request with these.
    Returns: [S, B, 6L + 2, D] float32 (float64 for a float64 model) on the model's device: per block shift, scale, gate
        of the attention, then of the MLP; last shift and scale of the head. Of 1 + scale, the scale.
    Source: Peebles and Xie 2023, section 3.2.
    """
    width, layers, packed = model.config.width, model.layers(), _packed(model)
    rows, branches, count = len(timesteps), len(labels), 6 * len(layers) + 2
    kind = torch.float64 if model.dtype == torch.float64 else torch.float32
    table = torch.empty((rows, branches, count, width), dtype=kind, device=model.device)
    by_branch = table.transpose(0, 1)  # conditioning vectors come as [B, S, D]
    times = _kept_times(model, tuple(timesteps)) if keep else _times(model, tuple(timesteps))
    ids = _sent(torch.tensor(labels, dtype=torch.int64), model.device)[:, None]
    for i, layer in enumerate(layers):
        part = layer.condition
        hidden = silu(part.label(ids) + times[i])
        _product(hidden, part.modulation, packed, by_branch[:, :, 6 * i : 6 * i + 6])
        if i == 0:
            _product(hidden, model.final_modulation, packed, by_branch[:, :, -2:])
    return table


def _times(model: DiT, timesteps: tuple[float, ...]) -> list[Tensor]:
    """Of every layer the embedding [S, D] of the timesteps."""
    packed = _packed(model)
    features = model.time_features(_sent(torch.tensor(timesteps, dtype=torch.float64), model.device))
    parts = [layer.condition for layer in model.layers()]
    return [_product(silu(_product(features, part.time_in, packed)), part.time_out, packed) for part in parts]


def _kept_times(model: DiT, timesteps: tuple[float, ...]) -> list[Tensor]:
    """The same, computed once for the timesteps of a plan."""
    known: dict[tuple[float, ...], list[Tensor]] = kept(model, "times", lambda _: {})
    if timesteps not in known:
        known[timesteps] = _times(model, timesteps)
        if len(known) > KEPT:
            known.pop(next(iter(known)), None)
    return known[timesteps]


def _product(
    x: Tensor, layer: nn.Linear, packed: Mapping[nn.Linear, PackedWeight], out: Tensor | None = None
) -> Tensor:
    """x W^T + b; out [..., k, D] takes it as k vectors, whatever its dtype."""
    flat = None if out is None else out.flatten(-2)
    if layer in packed:
        return our_linear(x, packed[layer], layer.bias, out=flat)
    made = linear(x, layer)
    return made if flat is None else flat.copy_(made)


def _packed(model: DiT) -> Mapping[nn.Linear, PackedWeight]:
    """Weights of the conditioning as our product reads them; none where torch's runs: on other devices and dtypes."""
    kinds = (torch.float32, torch.bfloat16)
    if model.device.type != "cpu" or model.dtype not in kinds or missing(CPU) is not None:
        return {}
    return kept(model, "conditioning", _pack)


def _pack(model: DiT) -> dict[nn.Linear, PackedWeight]:
    parts = [layer.condition for layer in model.layers()]
    linears = [layer for part in parts for layer in (part.time_in, part.time_out, part.modulation)]
    return {layer: pack_weight(layer.weight) for layer in (*linears, model.final_modulation)}


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Host numbers on a device, without waiting for it."""
    return numbers.to(device) if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)
