"""The sampling plan: the whole denoising loop as immutable, printable data.

A row (`Step`) is one network evaluation, or a row without one. A row has two halves that never mix: its *structure*
(`Variant`: which model, which branches, what every block does, how many tokens) decides shapes and code; its *numbers*
(timestep, coefficients, slots read) are data that a compiled row is handed.

Standard library only. Legality lives in `verify`, printing in `render`, files in `plan_io`, binding in `bind`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

if TYPE_CHECKING:
    from os import PathLike

    from vivace.engine.bind import ModelSpec

PREDICTIONS = ("eps", "x0", "v", "flow")
BRANCHES = ("cond", "uncond", "perturbed")
SITES = ("block", "attn", "cross_attn", "mlp", "residual", "layer", "kv", "received", "merge")
PRECISIONS = ("fp32", "bf16", "int8", "fp8")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A per-element coefficient: the tensor `key` of the plan's side-car, shape of the latent without batch."""

    key: str


@dataclass(frozen=True, slots=True)
class InputRef:
    """A coefficient the request supplies: a number or a tensor; `default` None means it must be given."""

    name: str
    default: float | None = None


@dataclass(frozen=True, slots=True)
class AgeRef:
    """A coefficient by class of a token: (skipped, steady, gap 1, ..., gap B, older); see `passes.token_history`."""

    values: tuple[float, ...]


Coef: TypeAlias = float | TensorRef | InputRef | AgeRef


@dataclass(frozen=True, slots=True)
class Affine:
    """dst <- sum(coef * slot). `at`: row whose (alpha, sigma) the written prediction belongs to; None = this row."""

    dst: str
    terms: tuple[tuple[str, Coef], ...]
    at: int | None = None


@dataclass(frozen=True, slots=True)
class Transform:
    """slot <- kind(slot, *reads): "clamp" (low, high), "dynamic_threshold" (ratio, max), "cfg_rescale" (cond; phi),
    "low_rank" (gains, basis): sum_k gains[k] <basis[k], slot> basis[k]; both are `TensorRef`s, [r] and [r, *latent]."""

    kind: str
    slot: str
    reads: tuple[str, ...] = ()
    params: tuple[tuple[str, Coef], ...] = ()


Op: TypeAlias = Affine | Transform


class Action(IntEnum):
    """What a block does in a row. IDENTITY: the attention map is replaced by the identity (perturbed branch)."""

    COMPUTE = 0
    REUSE = 1
    FORECAST = 2
    IDENTITY = 3


@dataclass(frozen=True, slots=True)
class Rule:
    """One statement about a range of blocks; None = not said here. Rules merge field by field, a site over its block.

    blocks: half-open; while unbound negative numbers count from the end and a last of 0 is the end: (0, 0) is all.
    site: one of `SITES`; branches None = all. With "layer" the range counts layers in blocks of a UNet: `DeepCache`.
    order: of the forecast; on COMPUTE: how many earlier values are kept. store: dtype in which the result is kept.
    precision: one of `PRECISIONS`; share: of tokens merged. weights: where its order + 1 begin in `Step.forecast`.
    """

    blocks: tuple[int, int]
    site: str = "block"
    branches: tuple[str, ...] | None = None
    action: Action | None = None
    order: int = 0
    store: str | None = None
    precision: str | None = None
    share: float = 1.0
    weights: int = 0


@dataclass(frozen=True, slots=True)
class Variant:
    """The structure of a row: everything that decides shapes and code. Empty `rules`: compute all, model precision."""

    model: str = "main"
    branches: tuple[str, ...] = ("cond",)
    rules: tuple[Rule, ...] = ()
    keep: float = 1.0
    selector: str = "all"
    selector_params: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Guard:
    """A run-time choice between two variants known beforehand. Same slots in and out; it never changes ops."""

    metric: str
    rule: str
    threshold: float
    otherwise: Variant
    params: tuple[float, ...] = ()
    sticky: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One row: evaluate the network on `x_scale * x` at `timestep`, one out slot per branch, then run `ops` in order.

    `alpha`, `sigma`: level of slot `x` before the row. `variant` None: a row without evaluation. `forecast`: weights of
    kept values, newest first, of every FORECAST rule one after the other (see `Rule.weights`).
    """

    timestep: float
    alpha: float
    sigma: float
    ops: tuple[Op, ...]
    variant: Variant | None = Variant()
    x: str = "x"
    x_scale: float = 1.0
    outs: tuple[str, ...] = ("out",)
    net_inputs: tuple[tuple[str, Coef], ...] = ()
    forecast: tuple[float, ...] = ()
    guard: Guard | None = None
    restart: bool = False

    @property
    def lam(self) -> float:
        """Half log-SNR log(alpha/sigma) of the level of `x`; infinite at pure noise (-inf) and at no noise (+inf)."""
        if self.sigma == 0.0:
            return math.inf
        return -math.inf if self.alpha == 0.0 else math.log(self.alpha / self.sigma)

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches this row evaluates when no guard fires; empty for a row without evaluation."""
        return () if self.variant is None else self.variant.branches


Value: TypeAlias = "None | bool | int | float | str | tuple[Value, ...] | Args"


@dataclass(frozen=True, slots=True)
class Args:
    """A frozen, ordered mapping of names to JSON values: the arguments of a recipe."""

    items: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def of(cls, mapping: Any) -> Args:
        """Freeze a mapping of JSON values; lists become tuples, mappings become `Args`."""
        return cls(tuple((str(name), freeze(value)) for name, value in dict(mapping).items()))

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts and lists, ready for `json` and for `**`."""
        return {name: thaw(value) for name, value in self.items}


def freeze(value: Any) -> Value:
    """A JSON value as immutable data."""
    if isinstance(value, Args):
        return value
    if isinstance(value, dict):
        return Args.of(value)
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"recipe: {type(value).__name__} is not a JSON value")


def thaw(value: Value) -> Any:
    """The inverse of `freeze`."""
    if isinstance(value, Args):
        return value.to_dict()
    return [thaw(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True)
class Recipe:
    """Enough to make the plan again: the maker with its arguments, the part kept, the passes in order.

    maker: "make_plan" or "from_diffusers"; `tail`: share that `Plan.tail` kept, None: all; `passes`: (name, arguments).
    """

    maker: str
    arguments: Args
    tail: float | None = None
    passes: tuple[tuple[str, Args], ...] = ()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the side-car: key, shape, dtype name ("float32", ...), SHA-256 of its little-endian bytes."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Binding:
    """What a plan was bound to. tokens: of the image; token_group: of `keep`; width: of a token, 0 unknown; layers:
    within all blocks together, 0 where they are not told apart."""

    fingerprint: str
    blocks: int
    tokens: int
    token_group: int
    latent_shape: tuple[int, ...]
    width: int = 0
    layers: int = 0


Derived = TypeVar("Derived")


class _Remembers:
    """Room beside the fields of an immutable object for what was derived from them."""

    __slots__ = ("_derived",)
    _derived: dict[str, Any]

    def once(self, name: str, make: Callable[[], Derived]) -> Derived:
        """make(), called the first time only."""
        if not hasattr(self, "_derived"):
            object.__setattr__(self, "_derived", {})
        if name not in self._derived:
            self._derived[name] = make()
        value: Derived = self._derived[name]
        return value


@dataclass(frozen=True, slots=True)
class Plan(_Remembers):
    """The denoising loop as data. Made by `make_plan` or `Plan.from_diffusers`, changed by passes, run by executors.

    steps: the rows; prediction: what the network returns, "eps" | "x0" | "v" | "flow"
    (v = alpha*eps - sigma*x0; flow = eps - x0); init: fills the first slots from `noise:0` and inputs; results: slots
    that a run hands back, "x" first.
    """

    steps: tuple[Step, ...]
    prediction: str
    init: tuple[Affine, ...]
    recipe: Recipe | None = None
    tensors: tuple[TensorInfo, ...] = ()
    binding: Binding | None = None
    # Values of the side-car by key (numpy arrays). Not part of equality: `tensors` holds their hashes.
    arrays: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    results: tuple[str, ...] = ("x",)

    def __hash__(self) -> int:
        compared = (self.steps, self.prediction, self.init, self.recipe, self.tensors, self.binding, self.results)
        return self.once("__hash__", lambda: hash(compared))

    @property
    def nfe(self) -> int:
        """Rows with a network evaluation; a guided pair counts as one."""
        return sum(step.variant is not None for step in self.steps)

    @property
    def branch_evals(self) -> int:
        """Branches evaluated over all rows: what the network really computes when no guard fires."""
        return sum(len(step.branches) for step in self.steps)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Distinct structures in order of first use, guards' alternatives included."""
        return self.once("variants", self._variants)

    def _variants(self) -> tuple[Variant, ...]:
        pairs = [(step.variant, None if step.guard is None else step.guard.otherwise) for step in self.steps]
        return tuple(dict.fromkeys(variant for pair in pairs for variant in pair if variant is not None))

    @property
    def inputs(self) -> tuple[InputRef, ...]:
        """Request inputs the plan reads: numbers and tensors, in order of first use."""
        return self.once("inputs", self._inputs)

    def _inputs(self) -> tuple[InputRef, ...]:
        named: list[Coef] = [InputRef("mask") for variant in self.variants if variant.selector == "mask"]
        named += [coef for step in self.steps for _, coef in step.net_inputs]
        for op in self.ops():
            named += [InputRef(slot.removeprefix("input:")) for slot in reads(op) if slot.startswith("input:")]
            named += coefs(op)
        return tuple(dict.fromkeys(coef for coef in named if isinstance(coef, InputRef)))

    def ops(self) -> tuple[Op, ...]:
        """All ops: those of `init`, then those of every row in order."""
        return (*self.init, *(op for step in self.steps for op in step.ops))

    # The methods below delegate to modules that import this one; each import is listed in the import-rule test.
    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON and the side-car's bytes."""
        from vivace.engine.plan_io import plan_hash

        return self.once("hash", lambda: plan_hash(self))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON, with a `.safetensors` side-car beside it when it has tensors. Atomic."""
        from vivace.engine.plan_io import save_plan

        save_plan(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read and verify a plan file. Raises PlanFileError or PlanError."""
        from vivace.engine.plan_io import load_plan

        return load_plan(path)

    def bind(self, spec: ModelSpec, shape: tuple[int, ...] | None = None) -> Plan:
        """Block ranges and token shares for a model and a latent shape (C, H, W); checked again. Binds to one only."""
        from vivace.engine.bind import bind_plan

        return bind_plan(self, spec, shape)

    def tail(self, strength: float) -> Plan:
        """The plan of an image-to-image run: its last int(steps * strength) rows, re-planned from the recipe.

        The start latent is the slot `input:start`, mixed with noise to the first level; strength in (0, 1].
        """
        from vivace.engine.planning import tail_plan

        return tail_plan(self, strength)

    def again(self, **changes: Any) -> Plan:
        """The plan of its recipe with changes to the maker's arguments (steps=, order=, ...); unbound."""
        from vivace.engine.planning import plan_again

        return plan_again(self, changes)

    @classmethod
    def from_diffusers(
        cls,
        scheduler: Any,
        steps: int = 20,
        *,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        strength: float = 1.0,
    ) -> Plan:
        """The plan that this `diffusers` scheduler (object or config) would run. strength below 1: its `tail`."""
        from vivace.engine.from_diffusers import plan_from_diffusers

        return plan_from_diffusers(scheduler, steps, timesteps=timesteps, sigmas=sigmas, mu=mu, strength=strength)

    def __str__(self) -> str:
        from vivace.engine.render import render_plan

        return render_plan(self)


def reads(op: Op) -> tuple[str, ...]:
    """Slots an op reads, its own slot included for a Transform."""
    return tuple(slot for slot, _ in op.terms) if isinstance(op, Affine) else (op.slot, *op.reads)


def writes(op: Op) -> str:
    """The slot an op writes."""
    return op.dst if isinstance(op, Affine) else op.slot


def coefs(op: Op) -> tuple[Coef, ...]:
    """Coefficients of an op, in order."""
    return tuple(coef for _, coef in (op.terms if isinstance(op, Affine) else op.params))
