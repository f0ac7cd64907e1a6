"""Our elementwise ops as foreign blocks need them: a foreign norm's parameters in, one choice of backend for all."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.spec import REFERENCE, Choice, choose

OPS = ("adaln_modulate", "gated_residual", "gelu", "linear", "norm_modulate", "qk_norm_rope")
DTYPES = (torch.float32, torch.bfloat16)
KINDS = {
    "torch.nn.modules.normalization.LayerNorm": "layer",
    "torch.nn.modules.normalization.RMSNorm": "rms",
    "diffusers.models.normalization.FP32LayerNorm": "layer",
    "diffusers.models.normalization.RMSNorm": "rms",
}


def class_of(module: Any) -> str:
    """Full name of the class of a module, by which patterns know it."""
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def norm_problem(norm: Any, dtype: torch.dtype) -> str | None:
    """Why our ops cannot stand for the module `norm` on tensors of `dtype`; None when they can."""
    name, weight = class_of(norm), getattr(norm, "weight", None)
    if name not in KINDS:
        return f"{type(norm).__name__} is no norm we know"
    if (
        norm.eps is None
        or len(norm.dim if name == "diffusers.models.normalization.RMSNorm" else norm.normalized_shape) > 1
    ):
        return f"{type(norm).__name__} over several dimensions or without eps"
    widened = torch.float32 if name == "diffusers.models.normalization.FP32LayerNorm" else dtype
    if weight is not None and weight.dtype not in (dtype, widened):
        return f"{type(norm).__name__} with {str(weight.dtype)[6:]} weights on {str(dtype)[6:]}"
    return None


class Ops:
    """The ops for tensors of one dtype; `backend` None leaves the choice to each call. Raises BackendError for a named
    backend that cannot run.

    choices: backend and reason of every op that runs faster than plain torch here; problems: the reason of the others.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, backend: str | None = None) -> None:
        self.dtype, self.backend = dtype, backend
        self.choices: dict[str, Choice] = {}
        self.problems: dict[str, str] = {}
        self.calls: dict[str, Callable[..., Any]] = {}
        for name in OPS:
            home = import_module(f"vivace.kernels.{name}")
            self.calls[name] = getattr(home, name)
            choice = choose(home.SPEC, device.type, str(dtype)[6:], backend)
            if choice.backend == REFERENCE and not choice.reason.startswith("asked for"):
                self.problems[name] = f"{name} has no fast backend: {choice.reason}"
            else:
                self.choices[name] = choice

    def ready(self, hidden: Any) -> bool:
        """This call can use our ops: no gradient, no autocast, a tensor of the dtype that the stand-in was made for."""
        return isinstance(hidden, Tensor) and hidden.dtype is self.dtype and ready(hidden)

    def norm(self, norm: Any, hidden: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """norm(hidden) * (1 + scale) + shift."""
        op = self.calls["norm_modulate"]
        result: Tensor = op(rows(hidden), scale, shift, **parameters(norm), backend=self.backend)
        return result

    def residual(self, hidden: Tensor, update: Tensor, gate: Tensor | None = None) -> Tensor:
        """hidden + gate * update."""
        result: Tensor = self.calls["gated_residual"](rows(hidden), rows(update), gate, backend=self.backend)
        return result

    def step(
        self,
        hidden: Tensor,
        update: Tensor,
        gate: Tensor | None,
        norm: Any,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(h, m): h = hidden + gate * update, m = norm(h) * (1 + scale) + shift."""
        given = {**parameters(norm), "backend": self.backend}
        h, m = self.calls["adaln_modulate"](rows(hidden), rows(update), gate, scale, shift, **given)
        return h, m

    def half(
        self,
        hidden: Tensor,
        update: Tensor,
        gate: Tensor | None,
        norm: Any,
        modulation: tuple[Tensor | None, ...],
        feed_forward: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The second half of a block: the attention's update joins, then the feed-forward; (scale, shift, gate)."""
        scale, shift, gate_out = modulation
        hidden, inner = self.step(hidden, update, gate, norm, scale, shift)
        return self.residual(hidden, feed_forward(inner), gate_out)

    def gelu(self, hidden: Tensor, *, approximate: str = "none", gated: bool = False, inside: bool = False) -> Tensor:
        """GELU(hidden), or value * GELU(gate); `inside`: into the memory of `hidden`."""
        out = hidden if inside and not gated else None
        given = {"gated": gated, "approximate": approximate, "out": out, "backend": self.backend}
        result: Tensor = self.calls["gelu"](rows(hidden), **given)
        return result

    def heads(
        self,
        query: Tensor,
        key: Tensor,
        norms: tuple[Any, Any],
        table: Any = None,
        *,
        rotate_from: int = 0,
        rotate_key: bool = True,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Norm and rotation of [B, N, H, K] queries and keys; table: (cos, sin), pairs interleaved."""
        cos = sin = None
        if table:  # detached: whoever watches the network's table does not watch ours
            cos, sin = (part.detach().to(query.device, torch.float32) for part in table)
        given: dict[str, Any] = {"kind": "none"}
        if norms[0] is not None:
            of_query, of_key = (parameters(norm) for norm in norms)
            given = {"kind": of_query["kind"], "eps": of_query["eps"]}
            given |= {f"query_{part}": of_query[part] for part in ("weight", "bias")}
            given |= {f"key_{part}": of_key[part] for part in ("weight", "bias")}
        given |= {"cos": cos, "sin": sin, "rotate_from": rotate_from, "rotate_key": rotate_key, "out": out}
        query, key = self.calls["qk_norm_rope"](rows(query), rows(key), **given, backend=self.backend)
        return query, key


def ready(hidden: Tensor) -> bool:
    """No gradient is recorded and no autocast is on; our ops know neither."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(hidden.device.type)


def rows(hidden: Tensor) -> Tensor:
    """`hidden` with the elements of a row side by side, as our ops take it."""
    return hidden if hidden.stride(-1) == 1 else hidden.contiguous()


def parameters(norm: Any) -> dict[str, Any]:
    """weight, bias, kind and eps of a foreign norm, as our ops name them."""
    bias = getattr(norm, "bias", None)
    return {"weight": norm.weight, "bias": bias, "kind": KINDS[class_of(norm)], "eps": norm.eps}
