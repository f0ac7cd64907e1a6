"""What a compiled executor asks of a model: networks compiled per variant and bucket, and what left the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from vivace.engine.kept import Seen, Turn
from vivace.engine.merging import Merging
from vivace.engine.plan import Variant
from vivace.engine.tokens import Focus


class Bucket(NamedTuple):
    """The shape class of an artefact: it runs up to that many image tokens and samples."""

    tokens: int
    samples: int


def bucket_of(tokens: int, samples: int) -> Bucket:
    """The bucket that `samples` pictures of `tokens` tokens fall into.

    Tokens go up to the next of 16, 24, 32, 48, 64, 96, ... (powers of two and one and a half times those), samples to
    the next power of two. An artefact works with what a call has; the rest of its bucket costs memory, not time.
    """
    power = 1 << max(tokens - 1, 1).bit_length() - 1
    rungs = (power, power + power // 2, 2 * power)
    return Bucket(max(16, next(rung for rung in rungs if rung >= tokens)), 1 << (samples - 1).bit_length())


@dataclass(frozen=True, slots=True, eq=False)
class Hoisted:
    """What left the loop of one request: `data` as the compiled network reads it by row, and the bytes of each part."""

    data: Any
    bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of a group of samples. Sequences are per sample.

    x: the network-input plane [lanes, ...] of the pool, whole; rows: of each sample's plan, which is what its
    `hoisted` is read by. turns: what is kept and what is given again; resume: where a look at the first blocks ended;
    focus: which image tokens a token row computes, None: all; merging: which blocks merge tokens, None: none.
    """

    x: Tensor
    lanes: tuple[int, ...]
    rows: tuple[int, ...]
    timesteps: tuple[float, ...]
    conditions: tuple[Any, ...]
    hoisted: tuple[Hoisted | None, ...]
    turns: tuple[Turn, ...] = ()
    resume: Seen | None = None
    focus: Focus | None = None
    merging: Merging | None = None

    def sample(self, n: int) -> Evaluation:
        """The evaluation of sample n alone."""
        one = slice(n, n + 1)
        return replace(
            self,
            lanes=self.lanes[one],
            rows=self.rows[one],
            timesteps=self.timesteps[one],
            conditions=self.conditions[one],
            hoisted=self.hoisted[one],
            turns=tuple(turn.pick((n,)) for turn in self.turns),
            resume=None if self.resume is None else self.resume.pick((n,)),
            focus=None if self.focus is None else self.focus.pick((n,)),
            merging=None if self.merging is None else self.merging.pick((n,)),
        )


class Network(Protocol):
    """A network compiled for one variant and one bucket. It holds nothing of a request.

    how: what runs a row, and why that, for the receipt.
    """

    how: str

    def run(self, call: Evaluation) -> tuple[Tensor, ...]:
        """One prediction [n, ...] per branch of the variant; valid until the next run."""
        ...

    def look(self, call: Evaluation, metric: str, params: Sequence[float]) -> Seen:
        """The first blocks alone, as far as a guard's metric needs them; a run with it as `resume` goes on there."""
        ...


class Compiler(Protocol):
    """Compiles one model for one backend. Prepared weights belong to it and are shared by its networks."""

    @property
    def precisions(self) -> frozenset[str]:
        """In which rows run, where a plan names precisions."""
        ...

    @property
    def sites(self) -> frozenset[str]:
        """Of which rows keep and give again; see `engine.caching`."""
        ...

    @property
    def metrics(self) -> frozenset[str]:
        """Of guards that networks can look at."""
        ...

    def why_not(self, variant: Variant) -> str | None:
        """Why a variant cannot be compiled; None when it can."""
        ...

    def compile(self, variant: Variant, bucket: Bucket, shape: Sequence[int]) -> Network:
        """The network of a variant for a bucket; `shape` is a latent of that bucket, to measure with."""
        ...

    def hoist(self, timesteps: Sequence[float], branches: Sequence[str], condition: Any) -> Hoisted | None:
        """What does not depend on x, for the rows of a plan that are fed `timesteps`; None: nothing leaves the loop."""
        ...

    def report(self) -> dict[str, Any]:
        """How the weights are kept and what was measured; plain data for the receipt."""
        ...
