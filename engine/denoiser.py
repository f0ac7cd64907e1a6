"""What the engine asks of a model: a spec, conditions from prompts, predictions per branch, pictures from latents.

A model whose blocks can be reached is also `Parts`: a stem (everything before the first block), blocks that read and
write one or two streams of tokens, and a head. Guidance branches are rows of the batch, in every part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vivace.engine.bind import ModelSpec
from vivace.engine.compiled import Compiler, Evaluation, Hoisted
from vivace.engine.kept import Seen, Turn
from vivace.engine.merging import Merging
from vivace.engine.plan import Variant
from vivace.engine.tokens import Focus
from vivace.errors import UnsupportedError


class Denoiser(Protocol):
    """A network the executors can run. It holds weights only; everything of a request is an argument.

    models: names of its networks as plans call them, "main" first; precisions: in which `evaluate` runs blocks, where
    a variant names them; digest: of the quantized weights it has for that, "" without; sites: of blocks, that it can
    keep and give again (with "kv" among them it runs rows that compute some tokens, with "received" it tells what
    attention these received, with "merge" it merges); metrics: of guards that `look` knows. One that takes further
    numbers, an embedded guidance scale, has `takes`, their names, and `feed(condition, numbers)`, which adds them; one
    that can replace attention maps by the identity has `identity` True.
    """

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    models: tuple[str, ...]
    precisions: frozenset[str]
    digest: str
    sites: frozenset[str]
    metrics: frozenset[str]

    def encode(self, prompt: Any) -> Any:
        """The condition of a prompt, opaque to the engine. Raises PromptError before any work starts."""
        ...

    def evaluate(
        self,
        x: Tensor,
        timesteps: Sequence[float],
        conditions: Sequence[Any],
        variant: Variant,
        turns: Sequence[Turn] = (),
        resume: Seen | None = None,
        focus: Focus | None = None,
        merging: Merging | None = None,
    ) -> tuple[Tensor, ...]:
        """Predictions of `variant.branches`: each [n, ...] for x [n, ...], one timestep and one condition a sample.

        turns: what is kept and what is given again; resume: where a look at the first blocks ended; focus: the image
        tokens of a row that computes some, None: all. Of its predictions only pixels of those tokens are read. merging:
        which blocks merge tokens, and for whom; None: none.
        """
        ...

    def why_not_kept(self, site: str, blocks: tuple[int, int]) -> str | None:
        """Why a site of `sites` cannot be kept or given again in these blocks; None when it can.

        Of "merge" and "merge_mlp": why tokens cannot be merged before the attentions, or MLPs, of these blocks.
        """
        ...

    def look(
        self,
        x: Tensor,
        timesteps: Sequence[float],
        conditions: Sequence[Any],
        variant: Variant,
        metric: str,
        params: Sequence[float],
    ) -> Seen:
        """The first blocks alone, as far as a guard's metric needs them."""
        ...

    def compiler(self) -> Compiler | Replayable:
        """Compiles the model for the CPU, or hands it out in pieces to replay on CUDA. Raises UnsupportedError, why."""
        ...

    def to_latent(self, image: Any) -> Tensor:
        """A picture or latent as a tensor of the latent's shape."""
        ...

    def to_images(self, latents: Tensor) -> list[Any]:
        """Latents [n, ...] as PIL pictures."""
        ...

    def reports(self) -> dict[str, Any]:
        """What text encoding and decoding did, for the receipt; plain data."""
        ...


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Piece:
    """One forward of an evaluation, taken apart so that it can be captured once and replayed.

    key: all that decides code and shapes. Of two pieces with equal keys either `forward`, on the inputs of one, gives
        the result of that one.
    inputs: by name the parts [r, ...] of a tensor, which is their concatenation along the first axis; made anew for
        every row, on the denoiser's device, or one part alone on the host.
    forward: a pure function of those tensors: rows [rows, ...], which the next call may overwrite. It makes nothing
        from host data, reads no value and branches on shapes only. Where it keeps things, inputs say in which lanes.
    places: where row i goes: b * n + s for branch b and sample s of n, or -1 where the row only fills its bucket.
    idle: in place of inputs of these names while the forward is only tried out: then it keeps nothing of anybody's.
    stands: whether memory that `forward` names is where it was; a piece of whose memory it is not is never made again.
    """

    key: Hashable
    inputs: Mapping[str, tuple[Tensor, ...]]
    forward: Callable[[Mapping[str, Tensor]], Tensor]
    places: tuple[int, ...]
    idle: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    stands: Callable[[], bool] = _always


def samples_of(x: Tensor, lanes: Sequence[int]) -> tuple[Tensor, ...]:
    """Samples [1, ...] at `lanes` of a plane x [lanes, ...], as parts of an input; one part where they lie in order."""
    first, count = lanes[0], len(lanes)
    if tuple(lanes) == tuple(range(first, first + count)):
        return (x[first : first + count],)
    return tuple(x[lane : lane + 1] for lane in lanes)


def predictions(pieces: Sequence[Piece], results: Sequence[Tensor], branches: int, samples: int) -> tuple[Tensor, ...]:
    """Predictions [n, ...] by branch from what the forwards of `pieces` returned; views where the rows lie in order."""
    wanted = [tuple(range(b * samples, (b + 1) * samples)) for b in range(branches)]
    if len(pieces) == 1:
        places = pieces[0].places
        starts = [places.index(order[0]) for order in wanted]
        if all(places[at : at + samples] == order for at, order in zip(starts, wanted, strict=True)):
            return tuple(results[0][at : at + samples] for at in starts)
    rows = [pair for piece, out in zip(pieces, results, strict=True) for pair in zip(piece.places, out, strict=True)]
    found = {place: row for place, row in rows if place >= 0}
    return tuple(torch.stack([found[place] for place in order]) for order in wanted)


class Replayable(Protocol):
    """A network whose evaluations come in pieces that a graph can capture and replay with other contents."""

    @property
    def precisions(self) -> frozenset[str]:
        """In which rows run, where a plan names precisions."""
        ...

    @property
    def sites(self) -> frozenset[str]:
        """Of which pieces keep and give again; rows with others are evaluated by the denoiser, without a graph."""
        ...

    def why_not(self, variant: Variant) -> str | None:
        """Why a variant cannot be staged; None when it can."""
        ...

    def stage(self, call: Evaluation, variant: Variant, bucket: Callable[[int], int]) -> tuple[Piece, ...]:
        """The pieces of an evaluation of `variant.branches`; nothing in here waits for the device.

        bucket: how many samples or rows a forward is filled up to, for that many.
        """
        ...

    def hoist(self, timesteps: Sequence[float], branches: Sequence[str], condition: Any) -> Hoisted | None:
        """What does not depend on x, for the rows of a plan that are fed `timesteps`; None: nothing leaves the loop."""
        ...

    def weights(self) -> Sequence[Tensor]:
        """What forwards read beside their inputs: parameters and buffers where they lie now, detached."""
        ...

    def report(self) -> dict[str, Any]:
        """How the weights are kept, for the receipt; plain data."""
        ...


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A block of a model, counted in the order of execution.

    name: its path, "transformer_blocks.3"; kind: "transformer", or "down" | "mid" | "up" of a UNet; text: it also
    writes the stream of text tokens; joint: hidden states hold text tokens and image tokens in one sequence.
    """

    index: int
    name: str
    kind: str = "transformer"
    text: bool = False
    joint: bool = False


@dataclass(frozen=True, slots=True)
class BlockOut:
    """What a block writes: hidden [R, N, D] (UNet: [R, C, H, W]), context [R, M, D] or None, skips of a down block."""

    hidden: Tensor
    context: Tensor | None = None
    skips: tuple[Tensor, ...] = ()


@dataclass(slots=True)
class BlockCall:
    """A block's turn in a forward.

    hidden: image tokens (or feature map) it reads; context: text tokens it reads, None without; skips: what an up
    block takes from the down path; image: slice of `hidden` along its tokens that are image tokens; options: whatever
    else the model hands to the block, by argument name; compute: runs the block as the model would, `hidden=`,
    `skips=`, `options=` with others, `inside=` as a stand-in that it makes of the block.
    """

    info: BlockInfo
    hidden: Tensor
    context: Tensor | None
    compute: Callable[..., BlockOut]
    skips: tuple[Tensor, ...] = ()
    image: slice = field(default_factory=lambda: slice(None))
    options: dict[str, Any] = field(default_factory=dict)


Interceptor = Callable[[BlockCall], BlockOut]


class Parts(Protocol):
    """A model whose blocks can be observed and replaced, in one forward, for one caller."""

    blocks: tuple[BlockInfo, ...]

    def forward(self, interceptor: Interceptor, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, every block's turn handed to `interceptor`; with `call.compute()` the same bits."""
        ...


class CallableDenoiser:
    """A plain function denoiser(x, t), denoiser(x, t, branch=..., guidance=[n]) as a `Denoiser` for `vivace.sample`."""

    models: tuple[str, ...] = ("main",)
    precisions: frozenset[str] = frozenset()
    digest: str = ""
    sites: frozenset[str] = frozenset()
    metrics: frozenset[str] = frozenset()
    takes: frozenset[str] | None = None  # any further input, by keyword

    def __init__(self, call: Callable[..., Tensor], prediction: str, shape: tuple[int, ...], like: Tensor) -> None:
        self.call = call
        self.device, self.dtype = like.device, like.dtype
        self.spec = ModelSpec("callable", "callable", prediction, shape, 0, (1,) * (len(shape) - 1))

    def encode(self, prompt: Any) -> None:
        return None

    def feed(self, condition: None, numbers: Mapping[str, float]) -> Mapping[str, float]:
        """Numbers that the function is called with, by keyword."""
        return numbers

    def evaluate(
        self,
        x: Tensor,
        timesteps: Sequence[float],
        conditions: Sequence[Any],
        variant: Variant,
        turns: Sequence[Turn] = (),
        resume: Seen | None = None,
        focus: Focus | None = None,
        merging: Merging | None = None,
    ) -> tuple[Tensor, ...]:
        t = torch.tensor(timesteps, dtype=x.dtype, device=x.device)
        fed = {name: t.new_tensor([numbers[name] for numbers in conditions]) for name in conditions[0] or ()}
        if variant.branches == ("cond",):
            return (self.call(x, t, **fed),)
        return tuple(self.call(x, t, branch=branch, **fed) for branch in variant.branches)

    def why_not_kept(self, site: str, blocks: tuple[int, int]) -> str:
        return "a plain function has no blocks"

    def look(self, *_: Any) -> Seen:
        raise UnsupportedError("a plain function has no blocks to look at")

    def compiler(self) -> Compiler:
        raise UnsupportedError("a plain function cannot be compiled")

    def to_latent(self, image: Any) -> Tensor:
        return torch.as_tensor(image, dtype=self.dtype, device=self.device)

    def to_images(self, latents: Tensor) -> list[Any]:
        return []

    def reports(self) -> dict[str, Any]:
        return {}
