"""Guidance-distilled networks of diffusers: the scale that they are fed, in the units of each family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vivace.engine.passes.guidance import EMBEDDED
from vivace.models.pipelines.conditions import Condition, Inputs, Row, signed
from vivace.models.pipelines.families import plain

# Class of the network -> what its pipeline multiplies the guidance scale by before it hands it over as `guidance`.
UNITS = {"FluxTransformer2DModel": 1.0, "Flux2Transformer2DModel": 1.0, "HunyuanVideoTransformer3DModel": 1000.0}


def taken(networks: Mapping[str, Any]) -> frozenset[str]:
    """Further inputs of networks: the embedded scale where each has one."""
    each = [plain(network) for network in networks.values()]
    embeds = all(type(one).__name__ in UNITS and one.config.get("guidance_embeds", False) for one in each)
    return frozenset({EMBEDDED}) if embeds else frozenset()


def fed(condition: Condition, numbers: Mapping[str, float], networks: Mapping[str, Any]) -> Condition:
    """A condition with another scale. numbers: of `EMBEDDED` alone."""
    main = plain(networks["main"])
    value = numbers[EMBEDDED] * UNITS[type(main).__name__]
    made: dict[str, Inputs] = {}
    for name, inputs in condition.branches.items():
        before = inputs.tree.get(EMBEDDED)
        like = before.value if isinstance(before, Row) else torch.empty(1, device=main.device)
        made[name] = signed({**inputs.tree, EMBEDDED: Row(torch.full_like(like, value))})
    return Condition(made)
