"""Kept things of the native DiT as inputs and outputs of its graphs: planes that are read, written and rounded.

A plane is read and written in float32 arithmetic, rounded once to its store: see `kernels.cache_update` and
`kernels.cache_apply`. In a token row what is kept of other tokens stays, so its planes come in wherever they go out.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.export.dit_parts import FLOAT, Parts
from vivace.models.caching.events import LISTENS
from vivace.runtime.calls import Kept
from vivace.runtime.manifest import Port

STORES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8": "float8_e4m3fn",
    "int8": "int8",
}
MOST_INT8, MOST_FLOAT8 = 127.0, 448.0


@dataclass(frozen=True, slots=True)
class Rows:
    """Which tokens a token row is about, int64. ids: [R, M] into N; flat: [R, M] into R N tokens, places: the same
    [R, M, 1]; count: N, [1]."""

    ids: str
    flat: str
    places: str
    count: str

    def taken(self, parts: Parts, plane: str, *last: int) -> str:
        """Those tokens of a plane [R, N, *last]."""
        return parts.to.op("Gather", self._flat(parts, plane, last), self.flat, name="taken", axis=0)

    def put(self, parts: Parts, plane: str, values: str, *last: int) -> str:
        """A plane [R, N, *last] with values [R, M, *last] in the place of those tokens."""
        made = parts.to.op("ScatterND", self._flat(parts, plane, last), self.places, values, name="put")
        return parts.to.op("Reshape", made, parts.to.op("Shape", plane, name="put.shape"), name="kept")

    @staticmethod
    def _flat(parts: Parts, plane: str, last: tuple[int, ...]) -> str:
        return parts.to.op("Reshape", plane, parts.to.constant([-1, *last]), name="flat")


@dataclass(frozen=True, slots=True)
class Plane:
    """A plane as it is stored: values [R, N, ...], and float32 [R, N] scales of int8."""

    values: str
    scales: str | None


@dataclass(frozen=True, slots=True)
class Planes:
    """The planes of one kept thing. some: the tokens of a token row, None: all."""

    parts: Parts
    kept: Kept
    some: Rows | None = None

    @property
    def dtype(self) -> str:
        """What is kept; keys and values are kept as they are where nothing is said."""
        if self.kept.store is not None:
            return STORES[self.kept.store]
        return self.parts.dtype if self.kept.site == "kv" else FLOAT

    @property
    def _last(self) -> tuple[int, ...]:
        """Sizes behind those of rows and tokens."""
        width = self.parts.weights.config.width
        return {"kv": (2 * width,), LISTENS: ()}.get(self.kept.site, (width,))

    def keep(self, fresh: str, frm: str, base: str | None = None) -> Plane:
        """Let fresh - base be the newest value, with `made` differences behind it; frm: dtype of both.

        Returns plane 0 as it is then, of all tokens, in `_moved`.
        """
        to, parts, made = self.parts.to, self.parts, self.kept.made
        with to.scope(self.kept.name):
            if base is not None or made:
                fresh = parts.cast(fresh, frm, FLOAT)
                base = None if base is None else parts.cast(base, frm, FLOAT)
                frm = FLOAT
            if base is not None:
                fresh = to.op("Sub", fresh, base, name="added")
            newest = Plane("", None)
            for j in range(made + 1):
                old = self.read(j) if j < made else ""
                written = self._write(j, fresh, frm)
                newest = newest if j else written
                if j < made:
                    fresh = to.op("Sub", fresh, old, name=f"difference{j + 1}")
            return newest

    def held(self, both: str) -> str:
        """Keep keys and values [R, M, 2 D], and what is attended to then: in a token row all that lie there."""
        newest = self.keep(both, self.parts.dtype)
        if self.some is None:
            return both
        with self.parts.to.scope(self.kept.name):
            if self._moved == self.parts.dtype and newest.scales is None:
                return newest.values
            return self.parts.cast(self._wide(newest, "all"), FLOAT, self.parts.dtype)

    def received(self, weights: str) -> None:
        """Keep what attention every token receives, by softmax weights [R, H, N, N] in the dtype of the network."""
        to = self.parts.to
        wide = self.parts.cast(weights, self.parts.dtype, FLOAT)
        heads = to.op("ReduceSum", wide, to.constant([2]), name="received.heads", keepdims=0)
        self.keep(to.op("ReduceMean", heads, to.constant([1]), name="received", keepdims=0), FLOAT)

    def read(self, j: int) -> str:
        """Plane j of the tokens that are meant, float32 [R, M, ...]."""
        plane = self._input(j)
        if self.some is not None:
            scales = None if plane.scales is None else self.some.taken(self.parts, plane.scales)
            plane = Plane(self.some.taken(self.parts, plane.values, *self._last), scales)
        return self._wide(plane, f"plane{j}")

    def given(self, hidden: str, gate: str | None) -> str:
        """hidden + gate * v, v the sum of the planes by their weights; of site "block" v alone."""
        parts, to, terms = self.parts, self.parts.to, self.kept.terms
        own = Port(f"{self.kept.name}.weights", FLOAT, (terms,), "weights", self.kept.name)
        with to.scope(self.kept.name):
            weights = to.input(own)
            each = [weights] if terms == 1 else to.ops("Split", weights, outputs=terms, axis=0, num_outputs=terms)
            wide = "" if self.kept.site == "block" else parts.cast(hidden, parts.dtype, FLOAT)
            by = None if gate is None else parts.cast(gate, parts.dtype, FLOAT)
            for j, weight in enumerate(each):
                factor = weight if by is None else to.op("Mul", by, weight, name=f"weight{j}")
                term = to.op("Mul", factor, self.read(j), name=f"term{j}")
                wide = to.op("Add", wide, term, name=f"sum{j}") if wide else term
            return parts.cast(wide, FLOAT, parts.dtype)

    @property
    def _moved(self) -> str:
        """In which dtype planes are put together of tokens; what is 8 bits wide and floats cannot be."""
        return FLOAT if self.dtype == STORES["fp8"] else self.dtype

    @property
    def _shape(self) -> tuple[int | str, ...]:
        """Of a plane's port."""
        return ("rows", "tokens", *self._last)

    def _input(self, j: int) -> Plane:
        """Plane j as it comes in, in `_moved`."""
        name, shape = self.kept.name, self._shape
        values = self.parts.to.input(Port(f"{name}.plane{j}", self.dtype, shape, "kept", name, 0, j))
        values = self.parts.cast(values, self.dtype, self._moved)
        if self.dtype != "int8":
            return Plane(values, None)
        scales = Port(f"{name}.scale{j}", FLOAT, shape[:2], "kept_scale", name, 0, j)
        return Plane(values, self.parts.to.input(scales))

    def _wide(self, plane: Plane, name: str) -> str:
        """What is stored, in float32; plane: in `_moved`."""
        to, values = self.parts.to, self.parts.cast(plane.values, self._moved, FLOAT)
        if plane.scales is None:
            return values
        scales = plane.scales if not self._last else to.op("Unsqueeze", plane.scales, to.constant([-1]), name="scales")
        return to.op("Mul", values, scales, name=name)

    def _write(self, j: int, fresh: str, frm: str) -> Plane:
        """Plane j with values [R, M, ...] of the tokens that are meant, in `_moved`."""
        parts, to, name = self.parts, self.parts.to, self.kept.name
        shape = self._shape
        made = self._rounded(fresh, frm)
        if self.some is not None:
            old = self._input(j)
            values = self.some.put(parts, old.values, made.values, *self._last)
            made = Plane(values, None if made.scales is None else self.some.put(parts, old.scales or "", made.scales))
        stored = parts.cast(made.values, self._moved, self.dtype)
        to.output(Port(f"{name}.plane{j}.new", self.dtype, shape, "kept", name, 0, j), stored)
        if made.scales is not None:
            to.output(Port(f"{name}.scale{j}.new", FLOAT, shape[:2], "kept_scale", name, 0, j), made.scales)
        return made if stored == made.values else Plane(parts.cast(stored, self.dtype, self._moved), None)

    def _rounded(self, fresh: str, frm: str) -> Plane:
        """Values within what the store holds, in `_moved`."""
        parts, to = self.parts, self.parts.to
        if self.dtype == "int8":
            return self._quantized(parts.cast(fresh, frm, FLOAT))
        if self.dtype == STORES["fp8"]:
            limits = to.constant(-MOST_FLOAT8, FLOAT), to.constant(MOST_FLOAT8, FLOAT)
            return Plane(to.op("Clip", parts.cast(fresh, frm, FLOAT), *limits, name="within"), None)
        return Plane(parts.cast(fresh, frm, self.dtype), None)

    def _quantized(self, values: str) -> Plane:
        """Numbers int8 [R, M, W] and the scale of every token, float32 [R, M]."""
        to = self.parts.to
        most = to.constant(MOST_INT8, FLOAT)
        largest = to.op("ReduceMax", to.op("Abs", values, name="size"), to.constant([-1]), name="largest", keepdims=1)
        step = to.op("Div", largest, most, name="step")
        empty = to.op("Equal", step, to.constant(0.0, FLOAT), name="empty")
        step = to.op("Where", empty, to.constant(1.0, FLOAT), step, name="scale")
        numbers = to.op("Round", to.op("Div", values, step, name="quotient"), name="rounded")
        numbers = to.op("Clip", numbers, to.constant(-MOST_INT8, FLOAT), most, name="within")
        return Plane(self.parts.cast(numbers, FLOAT, "int8"), to.op("Squeeze", step, to.constant([-1]), name="scales"))
