"""Is a model good enough to judge solvers on? `vivace bench gate`; `--op FOLDER` names another model.

A degenerate model makes every solver look good: one that draws the same picture for every seed needs no solver, one
whose trajectories are straight needs one evaluation. So two conditions, each at guidance 1 and at the card's:

    spread       variance of a pixel over seeds within a class, as a share of the variance of all, is at least 20% of
                 that share in the data; and so is the variance within a class alone
    difficulty   mean square error to the converged same-noise latents at 5 evaluations is at least 10 times that at 50

Reported beside them: share of pictures that look most like their own class, Frechet distance to the data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import vivace
from vivace.bench import harness
from vivace.errors import ArgumentError
from vivace.metrics import Features, check_names, converged, frechet
from vivace.metrics.reference import run as run_session
from vivace.models.pipe import default_plan

SPREAD, DIFFICULTY = 0.2, 10.0
FEW, MANY = 5, 50  # evaluations


@dataclass(frozen=True)
class Size:
    """How much is measured: classes x seeds pictures for the spread, prompts for the difficulty, evaluations of the
    pictures and of the converged latents."""

    classes: int = 500
    seeds: int = 2
    prompts: int = 16
    evaluations: int = 20
    converged: int = 200


FULL, QUICK = Size(), Size(classes=8, seeds=3, prompts=2, evaluations=8, converged=100)


@dataclass(frozen=True)
class Gate:
    """What was measured. within, total: pixel variances of the pictures; data_*: of the data; mse_few, mse_many: at 5
    and at 50 evaluations; top1: share named right; frechet: to the data, None for fewer pictures than features."""

    model: str
    guidance: float
    pictures: int
    within: float
    total: float
    data_within: float
    data_total: float
    mse_few: float
    mse_many: float
    top1: float
    frechet: float | None

    @property
    def spread(self) -> float:
        """Within-class share of the variance, and within-class variance, over the data's: the smaller of both."""
        within = self.within / self.data_within
        return min(within, within * self.data_total / self.total)

    @property
    def difficulty(self) -> float:
        """Error at few evaluations over error at many."""
        return self.mse_few / self.mse_many

    @property
    def passes(self) -> bool:
        """Both conditions hold."""
        return self.spread >= SPREAD and self.difficulty >= DIFFICULTY

    def to_dict(self) -> dict[str, Any]:
        """Everything, derived figures included."""
        derived = {"spread": self.spread, "difficulty": self.difficulty, "passes": self.passes}
        return asdict(self) | derived


def measure(pipe: Any, features: Features, guidance: float = 1.0, size: Size = FULL, folder: Any = None) -> Gate:
    """The figures of a model with class names.

    Args:
        pipe: from `vivace.load`. features: of that model. folder: of the reference cache, None: the usual one.
    Raises: ArgumentError for fewer than two seeds or classes.
    """
    if size.seeds < 2 or size.classes < 2:
        raise ArgumentError(f"gate: {size.classes} classes x {size.seeds} seeds; need at least two of each")
    plan = default_plan(pipe.model, steps=size.evaluations, guidance=guidance)
    ids = _spaced(pipe.model.classes, size.classes)
    labels = np.repeat(ids, size.seeds)
    session = pipe.compile(plan)
    pictures = run_session(session, labels.tolist(), list(range(size.seeds)) * len(ids))
    within, total = variances(features.pool(pictures).reshape(len(ids), size.seeds, -1))
    reference = converged(
        pipe, _spaced(pipe.model.classes, size.prompts).tolist(), (1,), guidance=guidance,
        evaluations=size.converged, folder=folder,
    )  # fmt: skip
    error = {}
    for steps in (FEW, MANY):
        row = default_plan(pipe.model, steps=steps, guidance=guidance)
        latents = run_session(session, reference.prompts, reference.seeds, plan=row)
        error[steps] = float(np.square(latents.astype(np.float64) - reference.latents).mean())
    return Gate(
        pipe.spec.name, guidance, len(pictures), within, total, *(float(v) for v in features.variance),
        error[FEW], error[MANY], check_names(pictures, labels, features).top1,
        frechet(pictures, features) if len(pictures) > 2 * features.count else None,
    )  # fmt: skip


def variances(x: npt.NDArray[Any]) -> tuple[float, float]:
    """Unbiased variance of a value within classes, and of all: [classes, seeds, values], averaged over values."""
    classes, seeds, values = x.shape
    within = np.square(x - x.mean(axis=1, keepdims=True)).sum() / (classes * (seeds - 1))
    total = np.square(x - x.mean(axis=(0, 1))).sum() / (classes * seeds - 1)
    return float(within / values), float(total / values)


def run(op: str | None = None, claim: str | None = None, quick: bool = False) -> dict[str, Any]:
    """The report of a suite: `op` names the model, default "emoji"; `claim` one of `gate.spread`, `gate.difficulty`."""
    if claim is not None and claim not in ("gate.spread", "gate.difficulty"):
        raise ArgumentError(f"gate: claim {claim!r} is unknown; use gate.spread or gate.difficulty")
    pipe, size = vivace.load(op or "emoji"), QUICK if quick else FULL
    features = Features.load(pipe.model.path.parent)
    scales = sorted({1.0, float(pipe.card.get("guidance_scale", 1.0))})
    gates = [measure(pipe, features, scale, size) for scale in scales]
    how = f"{pipe.spec.name}, the lesser of guidance {' and '.join(f'{s:g}' for s in scales)}, {size}"
    spread, difficulty = (min(getattr(gate, name) for gate in gates) for name in ("spread", "difficulty"))
    claims = [
        harness.Claim("gate.spread", ">=", SPREAD, how, spread, n=size.classes * size.seeds),
        harness.Claim("gate.difficulty", ">=", DIFFICULTY, how, difficulty, n=size.prompts),
    ]
    return harness.report("gate", [gate.to_dict() for gate in gates], [c for c in claims if claim in (None, c.name)])


def _spaced(classes: int, count: int) -> npt.NDArray[np.int64]:
    """`count` class ids, evenly spaced; all when there are fewer."""
    return np.unique(np.linspace(0, classes - 1, min(count, classes)).round().astype(np.int64))
