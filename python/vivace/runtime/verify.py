"""Does a pack still do on this machine what its model did where it was made? Its goldens, row by row."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vivace.engine.noise import normals
from vivace.engine.token_rows import tokens_of
from vivace.errors import PackError, PromptError
from vivace.runtime.loop import Run
from vivace.runtime.manifest import GOLDENS
from vivace.runtime.ort import Backend
from vivace.runtime.pack import Pack
from vivace.runtime.session import PackSession

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Verified:
    """Errors are max|a - b| / max|b|, infinite where one is not finite.

    rows: of slot x behind every row, tolerances: what each may be. apart: each row starts from what the goldens say
    that the one before it left, and computes the tokens that they name, so that rounding to narrow numbers does not add
    up. noise: draw 0 has the same bits. levels: most that a byte of the pictures differs, decoded from the golden
    latents, of `levels_allowed`; None where the pack does not decode. encoding: of the tensors that its encoders make
    of the prompt, None where it has none or tokenizers are not installed.
    """

    backend: str
    tolerances: tuple[float, ...]
    rows: tuple[float, ...]
    noise: bool
    levels: int | None
    levels_allowed: int
    encoding: float | None = None
    apart: bool = False

    @property
    def first(self) -> int | None:
        """The first row that deviates; None: none does."""
        pairs = enumerate(zip(self.rows, self.tolerances, strict=True))
        return next((row for row, (error, allowed) in pairs if not error <= allowed), None)

    @property
    def tolerance(self) -> float:
        """The largest tolerance of any row."""
        return max(self.tolerances, default=0.0)

    @property
    def error(self) -> float:
        """The largest error of any row."""
        return max(self.rows, default=0.0)

    @property
    def holds(self) -> bool:
        """Noise, the prompt, every row and the pictures are as they were."""
        encoded = self.encoding is None or self.encoding <= self.tolerance
        decoded = self.levels is None or self.levels <= self.levels_allowed
        return self.noise and encoded and self.first is None and decoded

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; an infinite error is None."""
        data = asdict(self) | {"rows": [_finite(error) for error in self.rows], "max_error": _finite(self.error)}
        data["tolerance"] = self.tolerance
        data["encoding"] = None if self.encoding is None else _finite(self.encoding)
        return data | {"first_deviating_row": self.first, "holds": self.holds}

    def __str__(self) -> str:
        lines = [f"row {row:3d}  error {error:.2e}" for row, error in enumerate(self.rows)]
        if self.first is not None:
            lines[self.first] += f"  the first beyond its tolerance {self.tolerances[self.first]:.1e}"
        if self.apart:
            lines.append("each row starts where the goldens say that the one before it ended")
        if not self.noise:
            lines.append("noise: other numbers than where the pack was made")
        if self.encoding is not None:
            lines.append(f"prompt: error {self.encoding:.2e} of its tensors")
        if self.levels is not None:
            lines.append(f"pictures: {self.levels} of 255 levels at most, {self.levels_allowed} allowed")
        said = "holds" if self.holds else "DEVIATES"
        return "\n".join([*lines, f"{said}: {self.error:.2e} at most, tolerance {self.tolerance:.1e} ({self.backend})"])


def verify_pack(
    pack: Pack,
    *,
    backend: str | Backend = "onnxruntime",
    threads: int | None = None,
    session: PackSession | None = None,
) -> Verified:
    """Run the goldens of a pack, every row, and say how far it is from them.

    session: of the pack, where one is loaded already. Raises PackError for a pack without goldens, or whose goldens are
    not of its plan; BackendError.
    """
    request, goldens = pack.goldens()
    needed = (*(f"row.{i}" for i in range(len(pack.plan.steps))), "noise", "latents")
    lacking = [name for name in needed if name not in goldens]
    lacking += [name for name in ("prompt", "n", "seed") if name not in request]
    if lacking:
        raise PackError(f"{pack.path}: {GOLDENS} holds no {lacking[0]!r}; export the pack again")
    made = session or PackSession(pack, backend=backend, threads=threads)
    conditions, given = _named(goldens, "condition."), _named(goldens, "input.")
    run = made.begin(
        conditions or request["prompt"],
        n=request["n"],
        seed=request["seed"],
        guidance_scale=request.get("guidance_scale"),
        image=given.pop("start", None),
        mask=given.pop("mask", None),
        inputs=given,
    )
    apart = "tolerances" in goldens  # something is kept or computed in numbers narrower than float32
    if apart:
        _check(pack, run, goldens)
    errors = _errors(run, goldens, apart)
    levels = _levels(made, goldens)
    allowed = max(1, math.ceil(255 * pack.manifest.tolerance))
    noise = _same_noise(made, request, goldens["noise"])
    encoding = _encoding(made, request["prompt"], conditions)
    tolerances = _tolerances(pack, goldens, len(errors))
    return Verified(made.backend.name, tolerances, errors, noise, levels, allowed, encoding, apart)


def _tolerances(pack: Pack, goldens: Mapping[str, Array], rows: int) -> tuple[float, ...]:
    """Of every row: as the goldens say, never more than the manifest."""
    most, said = pack.manifest.tolerance, goldens.get("tolerances", np.full(rows, np.inf))
    if said.shape != (rows,) or not (said > 0.0).all():
        raise PackError(
            f"{pack.path}: {GOLDENS}: tolerances of shape {said.shape} are not of {rows} rows; export again"
        )
    return tuple(min(most, float(each)) for each in said)


def _check(pack: Pack, run: Run, goldens: Mapping[str, Array]) -> None:
    """Raise PackError for goldens that no row can start from."""
    n, rows = len(run.asked.pictures), tokens_of(pack.plan).rows
    for name, array in goldens.items():
        if not (found := re.fullmatch(r"row\.(\d+)(\.tokens)?.*", name)):
            continue
        row = rows[int(found[1])] if int(found[1]) < len(rows) else None
        keep = 0 if row is None else int(row.keep)
        fits = array.shape == ((n, keep) if found[2] else (n, *run.shape))
        if found[2]:
            fits &= array.dtype.kind == "i" and bool(((array >= 0) & (array < run.layout.tokens)).all())
        if not fits:
            raise PackError(
                f"{pack.path}: {GOLDENS}: {name} has shape {array.shape}, or tokens that the plan has not; export again"
            )


def _errors(run: Run, goldens: Mapping[str, Array], apart: bool) -> tuple[float, ...]:
    """The error of slot x behind every row."""
    errors = []
    if apart and run.tokens is not None:
        ids = {row: goldens.get(f"row.{row}.tokens") for row in range(len(run.plan.steps))}
        run.tokens.told = {row: array for row, array in ids.items() if array is not None}
    while not run.done:
        prefix = f"row.{run.row}"
        run.step()
        errors.append(relative_error(run.slot("x"), goldens[prefix]))
        if apart:
            left = _named(goldens, f"{prefix}.")
            run.restore({"x": goldens[prefix], **{slot: a for slot, a in left.items() if slot != "tokens"}})
    return tuple(errors)


def relative_error(found: Array, wanted: Array) -> float:
    """max|found - wanted| / max|wanted|, infinite where shapes differ or one is not finite."""
    if found.shape != wanted.shape:
        return math.inf
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    return float(np.abs(a - b).max(initial=0.0) / max(float(np.abs(b).max(initial=0.0)), 1e-30))


def _same_noise(session: PackSession, request: Mapping[str, Any], wanted: Array) -> bool:
    drawn = [normals(session.shape, int(request["seed"]), picture=j) for j in range(int(request["n"]))]
    return bool(np.array_equal(np.stack(drawn), wanted))


def _encoding(session: PackSession, prompt: Any, wanted: Mapping[str, Array]) -> float | None:
    """The largest error of a tensor that the pack makes of the golden prompt."""
    if not session.graphs.encode or not isinstance(prompt, str):
        return None
    try:
        found = session.prompts(prompt).tensors
    except PromptError:  # tokenizers are not installed
        return None
    errors = [0.0]
    for name, array in wanted.items():
        branch, _, key = name.partition(".")
        made = found.get(branch, {}).get(key)
        errors.append(math.inf if made is None else relative_error(made, array[0]))
    return max(errors)


def _levels(session: PackSession, goldens: Mapping[str, Array]) -> int | None:
    """Most that a byte of a decoded picture differs."""
    if "pictures" not in goldens or session.graphs.decode is None:
        return None
    found = np.stack([np.asarray(image.convert("RGB")) for image in session.decode(goldens["latents"])])
    if found.shape != goldens["pictures"].shape:
        return 255
    return int(np.abs(found.astype(np.int16) - goldens["pictures"].astype(np.int16)).max())


def _named(goldens: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in goldens.items() if name.startswith(prefix)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
