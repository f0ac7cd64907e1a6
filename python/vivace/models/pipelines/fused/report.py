"""What became of every piece of a fused module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Replaced:
    """An op, the places it runs at in one forward, the backend it runs on and why that one."""

    op: str
    places: int
    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Left:
    """A piece that kept its own forward: path, class and reason."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class FusedReport:
    """Ops by name, pieces left in the order of the module's tree."""

    replaced: tuple[Replaced, ...] = ()
    left: tuple[Left, ...] = ()

    def places(self, op: str) -> int:
        """Places of `op`, 0 without."""
        return sum(entry.places for entry in self.replaced if entry.op == op)

    def to_dict(self) -> dict[str, Any]:
        """{"replaced": {op: {places, backend, reason}}, "left": [{kind, reason, names}]}, ready for JSON."""
        groups: dict[tuple[str, str], list[str]] = {}
        for piece in self.left:
            groups.setdefault((piece.kind, piece.reason), []).append(piece.name)
        return {
            "replaced": {
                entry.op: {"places": entry.places, "backend": entry.backend, "reason": entry.reason}
                for entry in self.replaced
            },
            "left": [{"kind": kind, "reason": reason, "names": names} for (kind, reason), names in groups.items()],
        }

    def __str__(self) -> str:
        lines = [f"{entry.op}: {entry.places} on {entry.backend} ({entry.reason})" for entry in self.replaced]
        left = self.to_dict()["left"]
        lines += [f"left: {len(group['names'])} {group['kind']}, {group['reason']}" for group in left]
        return "\n".join(lines)
