"""Our elementwise ops inside foreign networks: a stand-in in which known pieces run them, and what became of each.

Three kinds of pieces are known by class: norms, modulated norms and activations; blocks, whose chain of residuals,
norms and modulations is fused while attentions and linears stay the block's own; attention processors, whose norm and
rotation of queries and keys become one pass. Anything else, or anything unusual about a piece, leaves it as it is. The
original is not touched. A stand-in decides at every call: gradients, autocast, training or another dtype take the
original's path.
"""

from __future__ import annotations

from typing import Any

from vivace.models.pipelines.fused.build import Given, build, structure
from vivace.models.pipelines.fused.report import FusedReport, Left, Replaced

__all__ = ["Fused", "FusedReport", "Given", "Left", "Replaced", "fuse"]


def fuse(
    module: Any, *, backend: str | None = None, pack: bool = False, given: Given | None = None
) -> tuple[Any, FusedReport]:
    """A stand-in of the network `module` with our ops inside, and the report of what was replaced and what was left.

    Args:
        module: a diffusers transformer or UNet, float32 or bfloat16, in evaluation mode; others come back as they are.
        backend: of the ops, "reference" included; None: the fast one for the device, and plain torch without one.
        pack: linear layers on the CPU get a packed copy of their weights and run our product; weights changed later
            are not seen.
        given: stand-ins of linear layers that run otherwise, and packs that earlier calls made.
    Returns: (stand-in, report). The stand-in shares parameters, buffers and linears with the module. It is made of the
        module as it is now: after a LoRA was loaded, hooks were attached or a dtype changed, make another (`Fused`
        does).
    Raises: BackendError when a backend asked for by name cannot run; UnsupportedError where hooks hide a layer given.
    """
    return build(module, backend, pack, given)


class Fused:
    """The stand-in of one module, made anew when the module was changed: LoRA, hooks, dtype, processors, settings."""

    def __init__(self, module: Any, *, backend: str | None = None) -> None:
        self.module, self.backend = module, backend
        self._made: tuple[tuple[Any, ...], Any, FusedReport] | None = None

    def current(self) -> tuple[Any, FusedReport]:
        """(stand-in, report) for the module as it is now; costs some microseconds per submodule."""
        key = structure(self.module)
        if self._made is None or self._made[0] != key:
            self._made = (key, *build(self.module, self.backend))
        return self._made[1], self._made[2]
