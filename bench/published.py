"""Published figures of solvers, by our names of the methods, and how their order compares with a measured one.

Numbers are of other models, data and metrics: only the order within one table says something. Smaller is better.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CLOSE = 0.03  # two values count as equal, neither better, within this share of the larger

V3 = "Zheng et al. 2023 (DPM-Solver-v3)"


@dataclass(frozen=True)
class Published:
    """values: by evaluations, then by method; guided: compare with our rows at this guidance scale."""

    what: str
    source: str
    guidance: float
    values: Mapping[int, Mapping[str, float]]


def _columns(counts: Sequence[int], rows: Mapping[str, Sequence[float | None]]) -> dict[int, dict[str, float]]:
    """Rows by method to columns by evaluations."""
    out: dict[int, dict[str, float]] = {count: {} for count in counts}
    for name, values in rows.items():
        for count, value in zip(counts, values, strict=True):
            if value is not None:
                out[count][name] = value
    return out


TABLES: tuple[Published, ...] = (
    Published(
        "CIFAR-10, ScoreSDE, FID", f"{V3}, table 1", 1.0,
        _columns((5, 6, 8, 10, 12, 15, 20), {
            "ddim": (54.56, 41.92, 27.51, 20.11, 15.64, 12.05, 9.00),
            "deis tab 3": (15.37, None, None, 4.17, None, 3.37, 2.86),
            "dpm_solver 3 singlestep": (290.51, 23.78, 23.51, 4.67, 4.97, 3.34, 2.85),
            "dpm_solver 3": (27.40, 17.85, 9.04, 6.41, 5.31, 4.10, 3.30),
            "dpmpp_3m": (28.53, 13.48, 5.34, 4.01, 4.04, 3.32, 2.90),
            "unipc 3": (23.71, 10.41, 5.16, 3.93, 3.88, 3.05, 2.73),
            "dpm_solver_v3": (12.76, 7.40, 3.94, 3.40, 3.24, 2.91, 2.71),
        }),
    ),
    Published(
        "CIFAR-10, EDM, FID", "diff-sampler, common implementation", 1.0,
        _columns((5, 6, 8, 10), {
            "ddim": (49.66, 35.62, 22.32, 15.69),
            "heun": (None, 99.74, 38.06, 15.93),
            "dpm_solver 2 singlestep": (None, 60.00, 10.30, 5.01),
            "dpmpp_3m": (24.97, 11.99, 4.54, 3.00),
            "unipc 3": (23.98, 11.14, 3.99, 2.89),
            "deis tab 3": (14.39, 9.40, 5.55, 4.09),
            "ipndm 4": (13.59, 7.05, 3.69, 2.77),
        }),
    ),
    Published(
        "CIFAR-10, EDM, FID", "Liu et al. 2023 (USF), README", 1.0,
        _columns((5, 6, 8, 10), {
            "dpmpp_3m": (25.14, 12.31, 4.61, 3.08),
            "unipc 3": (24.15, 11.52, 4.05, 2.98),
            "dpm_solver_v3": (12.45, 8.76, 3.66, 2.62),
            "usf": (3.93, 2.48, 2.43, 2.20),
        }),
    ),
    Published(
        "Stable Diffusion 1.4, s = 1.5, latent MSE", f"{V3}, section 6", 1.0,
        _columns((5, 6, 8, 10, 12, 15, 20), {
            "dpmpp_2m": (.076, .056, .028, .016, .012, .009, .006),
            "unipc 2": (.055, .039, .024, .012, .007, .005, .002),
            "dpm_solver_v3": (.037, .027, .024, .007, .005, .001, .002),
        }),
    ),
    Published(
        "Stable Diffusion 1.4, s = 7.5, latent MSE", f"{V3}, section 6", 7.5,
        _columns((5, 6, 8, 10, 12, 15, 20), {
            "dpmpp_2m": (.60, .65, .50, .46, .42, .38, .30),
            "unipc 2": (.65, .71, .56, .46, .43, .35, .31),
            "dpm_solver_v3": (.55, .64, .49, .40, .45, .34, .29),
        }),
    ),
    Published(
        "DiT-XL/2 ImageNet-256, s = 3, FID", "Wizadwongsa et al. 2023 (momentum), table", 4.0,
        _columns((6, 8, 10, 15, 20), {
            "ddim": (55.35, 26.06, 15.02, 8.04, 6.52),
            "dpmpp_2m": (18.60, 7.93, 6.13, 5.49, 5.30),
            "ipndm 4": (13.10, 7.31, 6.03, 5.32, 5.21),
            "ipndm 4 + HB": (11.66, 6.69, 5.78, 5.29, 5.19),
            "ghvb 3.8": (10.99, 6.63, 5.80, 5.31, 5.22),
        }),
    ),
)  # fmt: skip


def order_of(values: Mapping[str, float]) -> list[str]:
    """Names, the best first."""
    return sorted(values, key=lambda name: values[name])


def inversions(ours: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[list[tuple[str, str]], int]:
    """Pairs (better there, better here) that are the other way round, and how many pairs both rank.

    A pair within `CLOSE` on either side is not counted.
    """
    turned, ranked = [], 0
    for a, b in itertools.combinations(sorted(ours.keys() & theirs.keys()), 2):
        if any(abs(v[a] - v[b]) <= CLOSE * max(abs(v[a]), abs(v[b])) for v in (ours, theirs)):
            continue
        ranked += 1
        if (ours[a] < ours[b]) != (theirs[a] < theirs[b]):
            turned.append((a, b) if theirs[a] < theirs[b] else (b, a))
    return turned, ranked


def beside(rows: Sequence[Mapping[str, Any]], on: str) -> list[str]:
    """Lines: each published order, ours by error at the same evaluations, and the pairs that differ."""
    lines = []
    for table in TABLES:
        lines.append(f"{table.what} ({table.source}), beside {on} at guidance {table.guidance:g}:")
        for count, theirs in table.values.items():
            ours = {
                row["solver"]: row["error"]
                for row in rows
                if (row["on"], row["guidance"], row["evaluations"]) == (on, table.guidance, count)
                and row.get("error") is not None
            }
            shared = theirs.keys() & ours.keys()
            if len(shared) < 2:
                continue
            turned, ranked = inversions(ours, theirs)
            lines.append(f"  {count:>2} published: {_chain({name: theirs[name] for name in shared})}")
            lines.append(f"     here:      {_chain({name: ours[name] for name in shared})}")
            told = ", ".join(f"{b} before {a}" for a, b in turned)
            lines.append(f"     {len(turned)} of {ranked} pairs the other way round{': ' if told else ''}{told}")
    return lines


def _chain(values: Mapping[str, float]) -> str:
    return " < ".join(f"{name} {values[name]:.3g}" for name in order_of(values))
