"""Run-time choices between two variants known beforehand: what a request's guards remember, and how they decide.

Metrics compare a signal of the row, taken after the first blocks, with an earlier one, picture by picture:
rel1 = mean|signal - earlier| / mean|earlier|, over all branches. "first_block" (Cheng 2024, First-Block-Cache): the
residual of the first params[0] blocks, against that of the last row that was computed; params[1] fires in a row at
most, 0: no limit. "modulated_input" (Liu et al. 2024, TeaCache, eq. 6): the first block's modulated input, against
that of the row before; params: a polynomial in rel1, highest power first, whose sum since the last computed row counts.
"guidance_cosine" looks at no block: it reads what earlier rows predicted (`engine.guiding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vivace.engine.guiding import Cosines
from vivace.engine.looking import EVERY_ROW
from vivace.engine.plan import Guard


@dataclass(frozen=True, slots=True)
class Decision:
    """What guards chose in a row, by picture: whether they fired, and the value that was compared; None: sticky."""

    row: int
    fired: tuple[bool, ...]
    values: tuple[float | None, ...]


@dataclass(slots=True)
class _Picture:
    """What guards of one metric remember of one picture."""

    earlier: Tensor | None = None  # [branches, ...]
    total: float = 0.0  # of the polynomial since the last computed row
    fires: int = 0  # in a row
    stuck: bool = False


@dataclass(slots=True)
class Watch:
    """The guards of a request of n pictures."""

    pictures: int
    decisions: list[Decision] = field(default_factory=list)
    _of: dict[str, list[_Picture]] = field(default_factory=dict)
    estimates: bool = False  # guards leave out branches that are then estimated
    cosines: Cosines = field(init=False)

    def __post_init__(self) -> None:
        self.cosines = Cosines([None] * self.pictures, self.estimates)

    def recall(self, guard: Guard, row: int) -> tuple[bool, ...]:
        """Whether a guard on what earlier rows predicted fires, by picture. Reads the device once, or not at all."""
        if (known := self._known(row)) is not None:
            return known
        fired, values = self.cosines.decide(guard)
        self.decisions.append(Decision(row, fired, values))
        return fired

    def decide(self, guard: Guard, signal: Tensor, row: int) -> tuple[bool, ...]:
        """Whether the guard fires, by picture, for a signal [branches, n, ...]. Reads the device once."""
        if (known := self._known(row)) is not None:
            return known
        states = self._states(guard)
        values = _changes(signal, [state.earlier for state in states])
        chosen = [
            _decide(guard, state, value, signal[:, j])
            for j, (state, value) in enumerate(zip(states, values, strict=True))
        ]
        fired = tuple(fires for fires, _ in chosen)
        self.decisions.append(Decision(row, fired, tuple(value for _, value in chosen)))
        return fired

    def computed(self, guard: Guard, signal: Tensor) -> None:
        """A row without a guard was computed: later ones compare with it."""
        for j, state in enumerate(self._states(guard)):
            _reset(state, signal[:, j])

    def stuck(self, guard: Guard) -> bool:
        """The guard fired for every picture and stays so: nothing needs to be looked at."""
        return guard.sticky and all(state.stuck for state in self._states(guard))

    def stay(self, row: int) -> tuple[bool, ...]:
        """The decision of a row whose guard is stuck."""
        fired = (True,) * self.pictures
        if self._known(row) is None:
            self.decisions.append(Decision(row, fired, (None,) * self.pictures))
        return fired

    @property
    def nbytes(self) -> int:
        """Bytes of the signals that are kept."""
        states = [state.earlier for states in self._of.values() for state in states]
        return sum(signal.nbytes for signal in states if signal is not None) + self.cosines.nbytes

    def _known(self, row: int) -> tuple[bool, ...] | None:
        """What was decided of a row already, which then failed and is tried again."""
        last = self.decisions[-1] if self.decisions else None
        return last.fired if last is not None and last.row == row else None

    def _states(self, guard: Guard) -> list[_Picture]:
        return self._of.setdefault(guard.metric, [_Picture() for _ in range(self.pictures)])


def _changes(signal: Tensor, earlier: Sequence[Tensor | None]) -> list[float]:
    """rel1 of every picture; infinity where there is nothing to compare with."""
    pairs = [(signal[:, j], before) for j, before in enumerate(earlier)]
    found = [
        torch.full((), torch.inf, dtype=torch.float64, device=signal.device)
        if before is None
        else (now - before).abs().sum(dtype=torch.float64) / before.abs().sum(dtype=torch.float64)
        for now, before in pairs
    ]
    values: list[float] = torch.stack(found).tolist()
    return values


def _decide(guard: Guard, state: _Picture, value: float, signal: Tensor) -> tuple[bool, float | None]:
    """Whether the guard fires for a picture, and what was compared. NaN never fires."""
    if guard.sticky and state.stuck:
        return True, None
    if guard.rule == "accumulated_below":
        state.total += _polynomial(guard.params, value)
        value = state.total
    fires = value > guard.threshold if guard.rule == "above" else value < guard.threshold
    if guard.metric == "first_block" and len(guard.params) > 1 and guard.params[1]:
        fires = fires and state.fires < guard.params[1]
    if not fires:
        _reset(state, signal)
        return False, value
    state.fires += 1
    state.stuck = guard.sticky
    if guard.metric in EVERY_ROW:
        state.earlier = signal.clone()
    return True, value


def _reset(state: _Picture, signal: Tensor) -> None:
    state.earlier, state.total, state.fires = signal.clone(), 0.0, 0


def _polynomial(coefficients: Sequence[float], value: float) -> float:
    """Horner's rule, highest power first; without coefficients the value itself."""
    total = 0.0
    for coefficient in coefficients or (1.0, 0.0):
        total = total * value + coefficient
    return total
