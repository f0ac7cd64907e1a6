"""Graphs of the native DiT: what does not depend on x, the rows of a plan, looks at the first blocks, pictures.

A row graph goes through the same events in the same order as `models.caching.native`, which is its definition.
"""

from __future__ import annotations

from collections.abc import Sequence

from vivace.engine.caching import Use
from vivace.engine.plan import Action
from vivace.errors import UnsupportedError
from vivace.export.builder import IR_VERSIONS, GraphBuilder
from vivace.export.dit_kept import Planes, Rows
from vivace.export.dit_once import (
    decode_graph,
    final_port,
    modulation_port,
    positions_graph,
    positions_port,
    prepare_graph,
)
from vivace.export.dit_parts import FLOAT, TORCH, DitWeights, Parts, Picture, latent_port
from vivace.export.pack import MadeGraph
from vivace.export.weights import WeightStore
from vivace.models.caching.events import APPLY, HALVES, KEYS, LISTENS, OPEN, Event, events_of, walk
from vivace.models.class_denoiser import ClassDenoiser
from vivace.models.dit import NORM_EPS
from vivace.models.pictures import MODES
from vivace.runtime.calls import Kept, Structure
from vivace.runtime.manifest import Port


def dit_graphs(
    denoiser: ClassDenoiser,
    structures: Sequence[Structure],
    *,
    dtype: str = FLOAT,
    opset: int = 21,
    store: WeightStore,
) -> list[MadeGraph]:
    """Graphs "prepare", "positions", one a structure, and "decode" where latents are pictures.

    Args:
        dtype: of weights and hidden states, "float32" | "float16" | "bfloat16"; latents, predictions, signals and kept
            values whose store is not said are float32 all the same.
        opset: 21 or 22, attention in products and a softmax; 23: the standard operator.
        store: takes the weights.
    Raises: UnsupportedError for other dtypes, opsets, models and sites.
    """
    if dtype not in TORCH:
        raise UnsupportedError(f"export: dtype {dtype!r}; a native DiT is exported in {', '.join(TORCH)}")
    if opset not in IR_VERSIONS:
        raise UnsupportedError(f"export: opset {opset}; graphs are written in {', '.join(map(str, IR_VERSIONS))}")
    weights = DitWeights(denoiser.model.module, store)
    made = [prepare_graph(Parts(GraphBuilder("prepare", opset), weights, dtype))]
    made.append(positions_graph(Parts(GraphBuilder("positions", opset), weights, dtype)))
    for number, structure in enumerate(structures):
        _check(structure, dtype)
        parts = Parts(GraphBuilder(name_of(structure, number), opset), weights, dtype)
        made.append(_RowGraph(parts, structure).made())
    if denoiser.model.pixels and weights.config.channels in MODES:
        made.append(decode_graph(GraphBuilder("decode", opset), weights.config.channels))
    return made


def name_of(structure: Structure, number: int) -> str:
    """A name for the graph of a structure, that says what is special about it."""
    said = [f"row{number}"]
    said += [structure.look] if structure.look else []
    said += [f"from{structure.begin}"] if structure.begin and not structure.look else []
    said += ["tokens"] if structure.tokens else []
    said += ["identity"] if structure.identity else []
    said += [word for word, gives in (("keep", False), ("reuse", True)) if _says(structure, gives)]
    said += sorted({precision for *_, precision in structure.precisions})
    return "-".join(said if len(said) > 1 else [*said, "full"])


def _check(structure: Structure, dtype: str) -> None:
    """Refuse what no graph of this dtype can be; floats narrower than it run in it."""
    if structure.model != "main":
        raise UnsupportedError(f"export: model {structure.model!r} of a plan; a native DiT has one, 'main'")
    if dtype != FLOAT and any(precision == "fp32" for *_, precision in structure.precisions):
        raise UnsupportedError(f"export: a row runs in fp32, the pack's network in {dtype}; export with dtype float32")


def _says(structure: Structure, gives: bool) -> bool:
    return any(kept.gives == gives and kept.site not in ("kv", LISTENS) for kept in structure.kept)


class _RowGraph:
    """One way through the blocks with what a structure says; see `models.caching.native`."""

    def __init__(self, parts: Parts, structure: Structure) -> None:
        self.parts, self.to, self.structure = parts, parts.to, structure
        self.config = parts.weights.config
        self.kept = [kept for kept in structure.kept if kept.site != LISTENS]
        self.listeners = {kept.first: kept for kept in structure.kept if kept.site == LISTENS and not kept.gives}
        self.picture = Picture.of(parts)
        self.modulation = self.to.input(modulation_port(parts))
        self.rows = self._rows() if structure.tokens else None
        self.vectors: dict[int, list[str]] = {}
        self.keys: Kept | None = None  # of the attention that comes next
        self.hidden = self.base = ""

    def made(self) -> MadeGraph:
        """The graph."""
        structure, layers = self.structure, self.config.layers
        if structure.look:
            return self._look()
        begin = structure.begin
        self.hidden = self.to.input(self._states()) if begin else self._stem()
        walk(events_of(tuple(map(_use, self.kept))), 2 * begin, 2 * layers, self._half, self._event)
        with self.to.scope("head"):
            place = None if self.rows is None else self._placed
            found = self.picture.head(self.hidden, self.to.input(final_port(self.parts)), place)
        self.to.output(latent_port(self.config.channels, "prediction", "prediction"), found)
        return self.to.made("row", structure)

    def _look(self) -> MadeGraph:
        """Blocks [0, begin), what a guard measures there, and the hidden states."""
        parts, to, structure = self.parts, self.to, self.structure
        start = self.hidden = self._stem()
        walk((), 0, 2 * structure.begin, self._half, self._event)
        with to.scope("look"):
            wide = parts.cast(start, parts.dtype, FLOAT)
            if structure.look == "first_block":
                signal = to.op("Sub", parts.cast(self.hidden, parts.dtype, FLOAT), wide, name="added")
            elif structure.look == "modulated_input":
                shift, scale = (parts.cast(vector, parts.dtype, FLOAT) for vector in self._of_block(0)[:2])
                signal = parts.modulated(wide, shift, scale, NORM_EPS, FLOAT)
            else:
                raise UnsupportedError(f"export: a DiT is not looked at by {structure.look!r}")
        shape = ("rows", "tokens", self.config.width)
        to.output(Port("signal", FLOAT, shape, "signal"), signal)
        to.output(self._states(), self.hidden)
        return to.made("row", structure)

    def _states(self) -> Port:
        return Port("hidden", self.parts.dtype, ("rows", "tokens", self.config.width), "hidden")

    def _stem(self) -> str:
        """Tokens [R, M, D] of the latent."""
        to, table = self.to, self.to.input(positions_port(self.parts))
        with to.scope("stem"):
            cells = self.picture.cells()
            if self.rows is not None:
                cells = self.rows.taken(self.parts, cells, self.config.channels * self.config.patch**2)
                table = to.op("Gather", table, self.rows.ids, name="positions_taken", axis=0)
            return to.op("Add", self.parts.linear(cells, "patches", "patches"), table, name="tokens")

    def _rows(self) -> Rows:
        """The tokens of a token row."""
        to = self.to
        ids = to.input(Port("token_ids", "int64", ("rows", "active"), "tokens"))
        with to.scope("active"):
            count = self.picture.tokens()
            rows = to.op("Squeeze", to.op("Shape", ids, name="rows", start=0, end=1), name="rows_count")
            first = to.op("Mul", to.op("Range", to.constant(0), rows, to.constant(1), name="row"), count, name="first")
            first = to.op("Unsqueeze", first, to.constant([1]), name="firsts")
            flat = to.op("Add", ids, first, name="flat")
            places = to.op("Unsqueeze", flat, to.constant([-1]), name="places")
        return Rows(ids, flat, places, count)

    def _placed(self, pixels: str) -> str:
        """Patches [R, M, P] of some tokens among zeros, [R, N, P]."""
        assert self.rows is not None
        to, config = self.to, self.config
        pieces = config.patch**2 * config.out_channels
        rows = to.op("Shape", self.rows.ids, name="rows", start=0, end=1)
        shape = to.op("Concat", rows, self.rows.count, to.constant([pieces]), name="zeros.shape", axis=0)
        zero = to.constant([0.0], self.parts.dtype)
        return self.rows.put(self.parts, to.op("Expand", zero, shape, name="zeros"), pixels, pieces)

    def _of_block(self, block: int) -> list[str]:
        if block not in self.vectors:
            self.vectors[block] = self.parts.of_block(self.modulation, block)
        return self.vectors[block]

    def _half(self, half: int, kept: Event | None) -> None:
        parts, block = self.parts, half // 2
        with self.to.scope(f"blocks.{block}"):
            shift, scale, gate = self._of_block(block)[3 * (half % 2) : 3 * (half % 2) + 3]
            with self.to.scope(HALVES[half % 2]):
                eps = self.config.norm_eps if half % 2 else NORM_EPS
                x = parts.modulated(self.hidden, shift, scale, eps, parts.dtype)
                fresh = parts.mlp(x, block) if half % 2 else self._attention(x, block)
                if kept is not None:
                    self._planes(self.kept[kept.turn]).keep(fresh, parts.dtype)
                self.hidden = parts.joined(self.hidden, gate, fresh)

    def _attention(self, x: str, block: int) -> str:
        kept, self.keys = self.keys, None
        if kept is None and self.structure.tokens:
            raise UnsupportedError(f"export: block {block} attends in a token row, and no keys and values were kept")
        if block in self.structure.identity:
            if kept is not None or block in self.listeners:
                raise UnsupportedError(f"export: block {block} has the identity for its map, and keys are kept there")
            return self.parts.identity_attention(x, block)
        held = None if kept is None else self._planes(kept).held
        listener = self.listeners.get(block)
        listen = None if listener is None else self._planes(listener).received
        return self.parts.attention(x, block, held, listen)

    def _event(self, event: Event) -> None:
        kept = self.kept[event.turn]
        if event.action == OPEN:
            self.base = self.hidden
        elif event.action == KEYS:
            self.keys = kept
        elif event.action != APPLY:
            base = self.base if event.site == "residual" else None
            self._planes(kept).keep(self.hidden, self.parts.dtype, base)
        else:
            gate = None
            if event.site in HALVES:
                with self.to.scope(f"blocks.{event.half // 2}"):
                    gate = self._of_block(event.half // 2)[3 * (event.half % 2) + 2]
            self.hidden = self._planes(kept).given(self.hidden, gate)

    def _planes(self, kept: Kept) -> Planes:
        return Planes(self.parts, kept, self.rows)


def _use(kept: Kept) -> Use:
    action = Action.REUSE if kept.gives else Action.COMPUTE
    return Use(kept.site, (kept.first, kept.last), action, (), kept.made, 0, kept.terms, kept.store)
