"""Prompts of networks of diffusers in a pack: tensors of a condition by name, text encoders and their tokenizers.

What becomes of a prompt is the pipeline's own `encode_prompt`, recorded once and traced with token ids as inputs. Where
its tokenizers cannot be told as files, or its text goes other ways, a pack takes tensors in place of texts.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vivace.export.pack import MadeGraph
from vivace.export.tidy import tidied
from vivace.export.tokenizers import tokenizer_file
from vivace.export.traced_ops import Decomposed, array_of, constants_of, exported, layers_of
from vivace.export.vae import decoder_modules
from vivace.export.weights import WeightStore
from vivace.models.pipelines.capture import hear
from vivace.models.pipelines.conditions import Condition, parts
from vivace.models.pipelines.denoiser import PipelineDenoiser
from vivace.models.pipelines.network import NetworkDenoiser
from vivace.models.pipelines.views import view
from vivace.runtime.manifest import Port

PROBES = ("a Red fox,  in the snow", "", " ".join(["blue boat on a lake"] * 200))


def spelt(path: str) -> str:
    """The name of a condition's tensor by its path in the arguments: "added_cond_kwargs.text_embeds"."""
    return path.strip("/").replace("/", ".")


def condition_tensors(denoiser: NetworkDenoiser, condition: Condition) -> dict[str, dict[str, Any]]:
    """What graphs read of an encoded prompt: by branch and name numpy arrays [1, ...], floats in float32."""
    return {
        branch: {name: array_of(_outside(value)) for name, value in _tensors(condition, branch).items()}
        for branch in condition.branches
    }


def prompts_of(denoiser: NetworkDenoiser) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(prompts of a manifest, files of tokenizers by name): of kind "text" where `encode_graph` makes one."""
    texts = texts_of(denoiser)
    if isinstance(texts, str):
        return {"kind": "tensors", "why": texts}, {}
    said = {name: each.said for name, each in texts.tokenizers.items()}
    files = {each.said["file"]: each.file for each in texts.tokenizers.values()}
    return {"kind": "text", "tokenizers": said, "negative": "", "example": PROBES[0]}, files


def exported_modules(denoiser: NetworkDenoiser) -> Mapping[str, Any]:
    """Modules whose weights are in the graphs, by name."""
    texts = texts_of(denoiser)
    encoders = {} if isinstance(texts, str) else texts.modules
    return {**denoiser.networks, **decoder_modules(denoiser), **encoders}


@dataclass(frozen=True)
class Told:
    """A tokenizer of a pack: what the manifest says of it, and its file."""

    said: dict[str, Any]
    file: bytes


@dataclass
class Texts:
    """How a pipeline encodes prompts.

    calls: arguments of `encode_prompt`, each time; places: of a condition's tensors (call, place in its result), or the
    tensor where no prompt changes it; tokenizers: by the pipeline's name, asked for `ids` or `masks`.
    """

    pipeline: Any
    calls: list[dict[str, Any]]
    places: dict[str, tuple[int, int] | Tensor]
    tokenizers: dict[str, Told] = field(default_factory=dict)
    masks: frozenset[str] = frozenset()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Text encoders."""
        found = self.pipeline.components.items()
        return {name: part for name, part in found if name.startswith("text_encoder") and isinstance(part, nn.Module)}


class Encoder(nn.Module):
    """Token ids to what networks read."""

    def __init__(self, texts: Texts, ports: tuple[Port, ...]) -> None:
        super().__init__()
        self._texts, self._ports = texts, ports
        for name, module in texts.modules.items():
            self.add_module(name, module)

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """The condition's tensors [1, ...] in order of their names."""
        texts, named = self._texts, {(port.source, port.key): t for port, t in zip(self._ports, tensors, strict=True)}
        answers = {name: (named["text", name], named.get(("text_mask", name))) for name in texts.tokenizers}
        stand_in = _standing(texts.pipeline, lambda name, *_, **asked: _answer(*answers[name], **asked))
        with Decomposed():
            results = [type(texts.pipeline).encode_prompt(stand_in, **call) for call in texts.calls]
        found = []
        for _, place in sorted(texts.places.items()):
            value = place.clone() if isinstance(place, Tensor) else results[place[0]][place[1]]
            found.append(_outside(value).clone())
        return found


def encode_graph(denoiser: NetworkDenoiser, opset: int, store: WeightStore) -> MadeGraph | None:
    """The graph of role "encode"; None where a pack takes no texts (`prompts_of` says why)."""
    texts = texts_of(denoiser)
    if isinstance(texts, str):
        return None
    ports: list[Port] = []
    for name, each in texts.tokenizers.items():
        shape = (1, int(each.said["length"]))
        ports.append(Port(f"{name}.ids", "int64", shape, "text", name))
        ports += [Port(f"{name}.mask", "int64", shape, "text_mask", name)] if name in texts.masks else []
    example = [torch.ones(tuple(map(int, port.shape)), dtype=torch.int64) for port in ports]
    encoder = Encoder(texts, tuple(ports))
    program, model = exported(encoder, example, [{} for _ in ports], opset, type(texts.pipeline).__name__)
    outputs = []
    for name, value in zip(sorted(texts.places), encoder(example), strict=True):
        dtype = str(value.dtype).removeprefix("torch.")
        outputs.append(Port(name, dtype, tuple(value.shape), "condition", name))
    made, used = tidied(model, ports, outputs, layers_of(program), store, known=constants_of(program))
    return MadeGraph("encode", "encode", made, used, tuple(outputs))


def texts_of(denoiser: NetworkDenoiser) -> Texts | str:
    """How a pipeline encodes prompts; else why a pack cannot."""
    if not isinstance(denoiser, PipelineDenoiser):
        return "a bare network takes tensors"
    if not denoiser.prompting.encodes or not hasattr(denoiser.pipeline, "encode_prompt"):
        return f"{type(denoiser.pipeline).__name__} has no text encoder here"
    runs = [_Run(denoiser, text) for text in PROBES]
    texts = _placed(denoiser, runs)
    if isinstance(texts, str):
        return texts
    for name in runs[0].asked:
        told = tokenizer_file(name, getattr(denoiser.pipeline, name), [run.asked[name] for run in runs], PROBES)
        if isinstance(told, str):
            return f"{name}: {told}"
        texts.tokenizers[name] = Told(*told)
    return texts


class _Run:
    """One recorded run: arguments and results of `encode_prompt`; asked: of each tokenizer what it was asked for and
    gave, the first time it filled up a text; condition: what came of it."""

    def __init__(self, denoiser: PipelineDenoiser, text: str) -> None:
        self.calls: list[dict[str, Any]] = []
        self.results: list[Any] = []
        self.asked: dict[str, tuple[Any, int, Any]] = {}
        pipeline, prompting = denoiser.pipeline, denoiser.prompting
        stand_in = _standing(pipeline, partial(self._tokenized, pipeline))
        own = partial(type(pipeline).encode_prompt, stand_in)
        signature = inspect.signature(pipeline.encode_prompt)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(dict(signature.bind(*args, **kwargs).arguments))
            self.results.append(own(*args, **kwargs))
            return self.results[-1]

        stand_in.__dict__["encode_prompt"] = encode_prompt
        with torch.no_grad():
            hear(stand_in, prompting.networks, prompting.arguments(text))
            self.condition = denoiser.encode(text)

    def _tokenized(self, pipeline: Any, name: str, text: Any, *args: Any, **kwargs: Any) -> Any:
        result = getattr(pipeline, name)(text, *args, **kwargs)
        if kwargs.get("padding") == "max_length" and name not in self.asked:
            self.asked[name] = text, int(result["input_ids"].shape[1]), result
        return result


def _placed(denoiser: PipelineDenoiser, runs: list[_Run]) -> Texts | str:
    """Where in the results the condition's tensors are; else why they are not found."""
    first, empty, *_ = runs
    condition, other = _tensors(first.condition, "cond"), _tensors(empty.condition, "cond")
    places: dict[str, tuple[int, int] | Tensor] = {}
    for name, value in condition.items():
        found = [
            (call, place)
            for call, result in enumerate(first.results)
            for place, each in enumerate(result)
            if isinstance(each, Tensor) and each.shape == value.shape and torch.equal(each.to(value.dtype), value)
        ]
        if found:
            places[name] = found[0]
        elif value.shape == other[name].shape and torch.equal(value, other[name]):
            places[name] = value
        else:
            return f"argument {name} of the network is not what encode_prompt returns"
    if "uncond" in first.condition.branches:
        unlike = [name for name, value in _tensors(first.condition, "uncond").items() if not _same(value, other[name])]
        if unlike:
            return f"argument {unlike[0]} of the unconditional branch is not that of the empty prompt"
    masks = frozenset(name for name, (_, _, result) in first.asked.items() if "attention_mask" in result)
    return Texts(denoiser.pipeline, first.calls, places, {}, masks)


def _standing(pipeline: Any, answer: Callable[..., Any]) -> Any:
    """A copy of a pipeline whose tokenizers answer by answer(name, text, ...)."""
    made = copy.copy(pipeline)
    for name in pipeline.components:
        tokenizer = getattr(pipeline, name)
        if name.startswith("tokenizer") and tokenizer is not None:
            made.__dict__[name] = view(tokenizer, __call__=partial(answer, name))
    return made


class _Answered(dict[str, Any]):
    """What a tokenizer returns, by key and by attribute."""

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def to(self, *_: Any) -> _Answered:
        """Itself."""
        return self


def _answer(ids: Tensor, mask: Tensor | None, padding: Any = None, **_: Any) -> _Answered:
    """The ids of a text that is filled up; where its own length is asked for, to tell of words cut off, one token."""
    kept = slice(None) if padding == "max_length" else slice(0, 1)
    return _Answered(input_ids=ids[:, kept], attention_mask=None if mask is None else mask[:, kept])


def _tensors(condition: Condition, branch: str) -> dict[str, Tensor]:
    return {spelt(path): values[0] for path, values in parts([condition.branch(branch)]).items()}


def _outside(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
