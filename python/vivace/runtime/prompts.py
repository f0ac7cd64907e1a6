"""Prompts of a pack: classes by name, texts by the pack's own encoders, or tensors as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vivace.errors import PackError, PromptError
from vivace.models.prompts import ClassName, Prompts

if TYPE_CHECKING:
    from vivace.runtime.calling import Opened
    from vivace.runtime.pack import Pack

Array: TypeAlias = NDArray[Any]
LABEL = "label"  # the tensor of prompts that are classes


@dataclass(frozen=True, slots=True)
class Condition:
    """What networks read of a prompt: tensors by branch and key, without an axis of rows; said: for receipts."""

    tensors: Mapping[str, Mapping[str, Array]]
    said: Any = None


Finder: TypeAlias = Callable[[Any], Condition]


def prompts_of(pack: Pack, encoders: Sequence[Opened], branches: Sequence[str]) -> Finder:
    """What finds the condition of a prompt, as the manifest says. Raises PackError for a kind of another release."""
    said = pack.manifest.prompts
    if said["kind"] == "class":
        return _Classes(said, branches)
    if said["kind"] == "tensors":
        return lambda prompt: given(prompt, branches)
    if said["kind"] == "text":
        return _Texts(pack, encoders, branches)
    raise PackError(f"{pack.path}: prompts of kind {said['kind']!r:.40}; this release knows class, text and tensors")


def given(prompt: Any, branches: Sequence[str]) -> Condition:
    """Tensors that a caller gives: {branch: {key: [...]}}, or {"branch.key": [1, ...]}. Raises PromptError."""
    if not isinstance(prompt, Mapping):
        raise PromptError("prompt: this pack encodes no text; give tensors, {branch: {key: array}}")
    found: dict[str, dict[str, Array]] = {branch: {} for branch in branches}
    for name, value in prompt.items():
        branch, _, key = str(name).partition(".")
        if branch not in found:
            raise PromptError(f"prompt: branch {branch!r:.60} is not among {', '.join(branches)}")
        if isinstance(value, Mapping):
            found[branch] |= {str(each): np.asarray(array) for each, array in value.items()}
        else:
            array = np.asarray(value)
            if array.ndim < 1 or len(array) != 1:
                raise PromptError(f"prompt: {name!r:.60} has shape {array.shape}; one prompt is needed, [1, ...]")
            found[branch][key] = array[0]
    if "perturbed" in found and not found["perturbed"]:  # the same prompt, another attention
        found["perturbed"] = found["cond"]
    return Condition(found, "tensors")


class _Classes:
    """Prompts are classes: by id, name, emoji or codepoint; branch "uncond" is the null label."""

    def __init__(self, said: Mapping[str, Any], branches: Sequence[str]) -> None:
        names = [ClassName(int(number), str(name), str(codepoint)) for number, name, codepoint in said["names"]]
        self.prompts, self.branches = Prompts(names, int(said["classes"])), tuple(branches)

    def __call__(self, prompt: Any) -> Condition:
        match = self.prompts.find(prompt)
        ids = {branch: self.prompts.classes if branch == "uncond" else match.id for branch in self.branches}
        return Condition({branch: {LABEL: np.array(number)} for branch, number in ids.items()}, asdict(match))


class _Texts:
    """Prompts are texts: tokenizers of the pack, then its encoders; the last ones are remembered."""

    kept = 16

    def __init__(self, pack: Pack, encoders: Sequence[Opened], branches: Sequence[str]) -> None:
        self.pack, self.encoders, self.branches = pack, tuple(encoders), tuple(branches)
        self._tokenizers: dict[str, Any] = {}
        self._found: dict[str, dict[str, Array]] = {}

    def __call__(self, prompt: Any) -> Condition:
        if isinstance(prompt, Mapping):
            return given(prompt, self.branches)
        if not isinstance(prompt, str):
            raise PromptError(f"prompt: {type(prompt).__name__}; this pack takes text, or tensors by branch and key")
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise PromptError(f"prompt: {prompt!r:.60} is no Unicode text; write it in UTF-8")
        if not self.encoders:
            raise PromptError("prompt: this pack has no text encoders; give tensors, {branch: {key: array}}")
        negative = str(self.pack.manifest.prompts.get("negative", ""))
        texts = {branch: negative if branch == "uncond" else prompt for branch in self.branches}
        return Condition({branch: self._encoded(text) for branch, text in texts.items()}, prompt)

    def _encoded(self, text: str) -> dict[str, Array]:
        """Tensors of a text by key."""
        if text not in self._found:
            found: dict[str, Array] = {}
            for opened in self.encoders:
                inputs = {port.name: self._ids(port, text) for port in opened.graph.inputs}
                made = opened.runner.run(inputs, {port.name: None for port in opened.graph.outputs})
                found |= {port.key: made[port.name][0] for port in opened.graph.outputs}
            while len(self._found) >= self.kept:
                del self._found[next(iter(self._found))]
            self._found[text] = found
        return self._found[text]

    def _ids(self, port: Any, text: str) -> Array:
        """Token ids, or their mask, [1, length] of the tokenizer that a port names."""
        encoding = self._tokenizer(port.key).encode(text)
        numbers = encoding.ids if port.source == "text" else encoding.attention_mask
        return np.array([numbers], port.dtype)

    def _tokenizer(self, name: str) -> Any:
        """A tokenizer of the pack, which fills and cuts to its length. Raises PromptError, PackError."""
        if name not in self._tokenizers:
            said = self.pack.manifest.prompts.get("tokenizers", {}).get(name)
            if said is None:
                raise PackError(f"{self.pack.path}: the manifest describes no tokenizer {name!r:.60}")
            try:
                from tokenizers import Tokenizer
            except ImportError:
                raise PromptError(
                    "prompt: texts need `pip install tokenizers`; without it give tensors, {branch: {key: array}}"
                ) from None
            made = Tokenizer.from_file(str(self.pack.path / said["file"]))
            length = int(said["length"])
            made.enable_truncation(length)
            made.enable_padding(length=length, pad_id=int(said["pad_id"]), pad_token=str(said["pad_token"]))
            self._tokenizers[name] = made
        return self._tokenizers[name]
