"""A request and what becomes of it: the state under way, the report of a row, the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vivace.engine.caching import CachePlan
from vivace.engine.compiled import Hoisted
from vivace.engine.guards import Watch
from vivace.engine.iterate import Iterate
from vivace.engine.kept import Kept
from vivace.engine.merging import Merges
from vivace.engine.plan import Plan
from vivace.engine.pool import Entry, Pool
from vivace.engine.receipt import Receipt
from vivace.engine.sources.base import StepSource
from vivace.engine.tokens import Tokens
from vivace.errors import ArgumentError, StateError

SEED_LIMIT = 1 << 64
PICTURE_LIMIT = 1 << 32


@dataclass(frozen=True, slots=True)
class Request:
    """What one caller wants: pictures `index` .. `index + n - 1` of `seed` for a prompt.

    plan: None for the session's first, or any plan or source that binds to its model and shape. latents: unit normal
    [n, *latent] in place of the generator's draw 0. guidance_scale: in place of the plan's. image, mask: start picture
    and weights of plans that read `input:start` and `mask`. inputs: further numbers and tensors by name.
    """

    prompt: Any = None
    plan: Plan | StepSource | None = None
    n: int = 1
    index: int = 0
    seed: int = 0
    latents: Tensor | None = None
    guidance_scale: float | None = None
    image: Any = None
    mask: Any = None
    inputs: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ArgumentError unless n, index and seed are integers in range."""
        for name, value, low, high in (
            ("n", self.n, 1, 1 << 20),
            ("index", self.index, 0, PICTURE_LIMIT - (self.n if isinstance(self.n, int) else 0) + 1),
            ("seed", self.seed, 0, SEED_LIMIT),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
                raise ArgumentError(f"request: {name} is {value!r}; an integer from {low} to {high - 1} is needed")

    @property
    def pictures(self) -> range:
        """Numbers of the pictures of the seed."""
        return range(self.index, self.index + self.n)

    @property
    def signed_seed(self) -> int:
        """The 64-bit seed as the two's complement integer that tensors hold."""
        return self.seed - SEED_LIMIT if self.seed >= SEED_LIMIT >> 1 else self.seed


@dataclass(slots=True, eq=False)
class State:
    """A request under way. `row`: rows done; `done`: all of them; all it owns are lanes of `pool` and of `kept`.

    caches: what its rows keep and give again; merges: what its merged tokens keep, tokens: state of every token, None
    where its plan says nothing of them; watch: what its guards remember, None without guards; ahead: predictions of
    rows to come, by row, that read nothing of x or were made together; iterate: what a Picard run remembers.
    """

    request: Request
    plan: Plan
    condition: Any
    pool: Pool
    entry: Entry
    lanes: tuple[int, ...]
    owner: int
    warnings: tuple[str, ...]
    began: float
    caches: CachePlan
    hoisted: Hoisted | None = None
    kept: Kept | None = None
    merges: Merges | None = None
    tokens: Tokens | None = None
    watch: Watch | None = None
    ahead: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    iterate: Iterate | None = None
    row: int = 0
    closed: str = ""
    records: list[Any] = field(default_factory=list)
    seeds: tuple[int, ...] = field(init=False)  # of each lane, as are the pictures
    pictures: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        seed, n = self.request.signed_seed, len(self.lanes)
        self.seeds, self.pictures = (seed,) * n, tuple(self.request.pictures)

    @property
    def done(self) -> bool:
        """Every row of the plan was executed."""
        return self.row >= len(self.plan.steps)


@dataclass(frozen=True, slots=True)
class Report:
    """What a step did for one state: the row executed, of how many, at which timestep; whether it was the last."""

    row: int
    rows: int
    timestep: float
    done: bool


@dataclass(frozen=True, slots=True)
class Result:
    """Finished pictures: PIL images, latents [n, ...], the receipt, and the condition the prompt found.

    computed: int32 [n, *grid], how many evaluations computed each image token; None for plans that always compute all.
    plans: the bound plan that ran; of a source the rows that it took, a plan for every picture.
    slots: what the plan's other `results` hold, [n, ...] by name; each may be an input of the plan that goes on.
    """

    images: list[Any]
    latents: Tensor
    receipt: Receipt
    condition: Any = None
    computed: Tensor | None = None
    slots: Mapping[str, Tensor] = field(default_factory=dict)
    plans: tuple[Plan, ...] = ()

    @property
    def plan(self) -> Plan:
        """The plan that ran. Raises StateError where the pictures of a source took different ones."""
        if len(set(self.plans)) != 1:
            raise StateError(f"result: {len(self.plans)} pictures took plans of their own; use result.plans")
        return self.plans[0]
