"""Prompt embeddings kept across calls, found again by the content of everything that made them."""

from __future__ import annotations

import functools
import hashlib
import inspect
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vivace.errors import ArgumentError
from vivace.models.pipelines.module_state import Serials, module_state, why_unrepeatable

# Components that no `encode_prompt` computes with: of these only the dtype counts. Any other module is a text encoder.
_NOT_TEXT = ("unet", "transformer", "vae", "vqvae", "vqgan", "movq", "controlnet", "image_encoder", "safety_checker")
_PLAIN = (str, int, float, bool, bytes, type(None), torch.device, torch.dtype)


class PromptCache:
    """Prompt embeddings by content, at most `limit_bytes` of them, the least recently used dropped first.

    Threads find what is kept side by side. Encoding is one at a time, under `encoding`: tokenizers of the `tokenizers`
    library keep padding and truncation of a call on themselves, so two threads inside one of them mix their prompts.

    What is kept is a copy, and what is handed out is a copy again: a caller may edit its embeddings in place, through
    any alias, without a trace here. Comparing versions instead would miss edits through `.data` and lose the entry.

    Args:
        limit_bytes: bound of the tensors held, bytes; one result larger than this is not kept; 0 keeps nothing.
    Raises: ArgumentError.
    """

    def __init__(self, limit_bytes: int = 256 * 2**20) -> None:
        if not isinstance(limit_bytes, int) or isinstance(limit_bytes, bool) or limit_bytes < 0:
            raise ArgumentError(f"PromptCache: limit_bytes is {limit_bytes!r}; give a number of bytes, 0 or more")
        self.limit_bytes = limit_bytes
        self.serials = Serials()
        self.encoding = threading.RLock()
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._counts: Counter[str] = Counter()
        self._bypassed: Counter[str] = Counter()

    def find(self, key: bytes) -> Any:
        """A copy of what is kept under `key`, which counts as a hit; None without."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            self._counts["hits"] += 1
        return _copy(entry[0])

    def miss(self) -> None:
        """Count a call that is computed."""
        with self._lock:
            self._counts["misses"] += 1

    def keep(self, key: bytes, value: Any) -> None:
        """Keep a copy of `value`: tensors and plain values in tuples, lists and dicts."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))
        if size > self.limit_bytes:
            with self._lock:
                self._counts["too_large"] += 1
            return
        with torch.inference_mode(False):  # an inference tensor could not be handed to a call outside of that mode
            copied = _copy(value)
        with self._lock:
            self._bytes -= self._entries.pop(key, (None, 0))[1]
            while self._bytes + size > self.limit_bytes:
                self._bytes -= self._entries.popitem(last=False)[1][1]
                self._counts["evicted"] += 1
            self._entries[key] = (copied, size)
            self._bytes += size

    def bypass(self, reason: str) -> None:
        """Count a call that neither looked here nor left anything."""
        with self._lock:
            self._bypassed[reason] += 1

    def clear(self) -> None:
        """Drop every entry; the counts stay."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def summary(self) -> dict[str, Any]:
        """For the receipt: hits, misses, evicted, too_large, bypassed {reason: calls}, entries, bytes, limit_bytes."""
        with self._lock:
            counts = {name: self._counts[name] for name in ("hits", "misses", "evicted", "too_large")}
            held = {"entries": len(self._entries), "bytes": self._bytes, "limit_bytes": self.limit_bytes}
            return {**counts, "bypassed": dict(self._bypassed), **held}


def cached_encode_prompt(
    pipeline: Any, cache: PromptCache, note: Callable[[str], None] | None = None
) -> Callable[..., Any]:
    """encode_prompt(...) of `pipeline`, answered from `cache` where the same call was answered before, bit for bit.

    The key is the content of every argument, by name; device, dtypes and plain settings of the pipeline; autocast and
    the number of threads; the state of every text encoder (module_state.py) and tokenizer. A call that cannot be keyed
    goes to the pipeline and is counted with its reason: an argument of unknown type, gradients, dropout in training
    mode, a forward hook of the caller. A result is not kept when the state changed while it was computed.

    Args:
        pipeline: anything with `encode_prompt` whose components are attributes, such as a diffusers pipeline.
        note: called with "hit", "miss" or "bypassed: <reason>", once a call, for the receipt of that call.
    Returns: a callable with the signature of `pipeline.encode_prompt`.
    """
    encode = pipeline.encode_prompt
    signature, tell = inspect.signature(encode), note or (lambda outcome: None)

    @functools.wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return encode(*args, **kwargs)  # raises its own
        bound.apply_defaults()
        key, reason = _key(pipeline, bound.arguments, cache.serials)
        if key is None:
            cache.bypass(reason)
            tell(f"bypassed: {reason}")
            with cache.encoding:
                return encode(*args, **kwargs)
        found = cache.find(key)
        if found is None:
            with cache.encoding:
                found = cache.find(key)  # made while this thread waited
                if found is None:
                    cache.miss()
                    tell("miss")
                    found = encode(*args, **kwargs)
                    if _copyable(found) and key == _key(pipeline, bound.arguments, cache.serials)[0]:
                        cache.keep(key, found)
                    return found
        tell("hit")
        if bound.arguments.get("lora_scale") is not None and hasattr(type(pipeline), "lora_scale"):
            pipeline._lora_scale = bound.arguments["lora_scale"]  # encode_prompt leaves it for the denoiser
        return found

    return encode_prompt


class _Unkeyable(Exception):
    """Why a call cannot be keyed."""


def _key(pipeline: Any, arguments: dict[str, Any], serials: Serials) -> tuple[bytes | None, str]:
    """SHA-256 of everything `encode_prompt` reads; or None and why there is none."""
    digest = hashlib.sha256()
    try:
        for name, value in arguments.items():
            _feed(digest, value, f"argument {name}")
        _feed(digest, _surroundings(pipeline, arguments.get("device")), "the surroundings")
        for name, part in sorted(vars(pipeline).items()):
            if name.startswith("_"):
                continue
            if isinstance(part, torch.nn.Module):
                _feed(digest, [name, _module_key(name, part, serials)], name)
            elif "tokenizer" in name or name == "processor":
                _feed(digest, [name, *_tokenizer_key(part, serials)], name)
            elif type(part) in _PLAIN:
                _feed(digest, [name, part], name)
    except _Unkeyable as reason:
        return None, str(reason)
    return digest.digest(), ""


def _surroundings(pipeline: Any, device: Any) -> list[Any]:
    """The device asked for, or else the pipeline's, and what of torch's state decides the bits of a forward."""
    place = getattr(pipeline, "_execution_device", None) if device is None else device
    kind = "cpu" if place is None else torch.device(place).type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    lowered = torch.get_autocast_dtype(kind) if autocast else None
    return [str(place), lowered, torch.get_num_threads(), torch.get_default_dtype()]


def _module_key(name: str, part: torch.nn.Module, serials: Serials) -> Any:
    if name.startswith(_NOT_TEXT):
        return getattr(part, "dtype", None)
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in part.parameters()):
        raise _Unkeyable(f"gradients of {name} are recorded; call under torch.no_grad()")
    reason = why_unrepeatable(part)
    if reason is not None:
        raise _Unkeyable(f"{name} {reason}")
    return module_state(part, serials)


def _tokenizer_key(tokenizer: Any, serials: Serials) -> list[Any]:
    """Identity and what changes a tokenizer after it was made: added tokens, sides, length."""
    if type(tokenizer) in _PLAIN:
        return [tokenizer]
    names = ("padding_side", "truncation_side", "model_max_length")
    settings = [getattr(tokenizer, name, None) for name in names]
    return [serials(tokenizer), len(tokenizer) if hasattr(tokenizer, "__len__") else None, *settings]


def _feed(digest: Any, value: Any, where: str) -> None:
    """Content of `value` into `digest`, every part with its type and length, so that no two values read the same."""
    if type(value) in _PLAIN:
        text = repr(value).encode()
        digest.update(f"{type(value).__qualname__}:{len(text)}:".encode() + text)
    elif type(value) in (list, tuple):
        digest.update(f"{type(value).__qualname__}:{len(value)}:".encode())
        for item in value:
            _feed(digest, item, where)
    elif type(value) is dict:
        _feed(digest, [item for pair in value.items() for item in pair], where)
    elif type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided and value.device.type != "meta":
        if value.requires_grad and torch.is_grad_enabled():
            raise _Unkeyable(f"gradients of {where} are recorded; call under torch.no_grad()")
        digest.update(repr((value.dtype, tuple(value.shape), value.device)).encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        raise _Unkeyable(f"{where} holds a {type(value).__name__}, whose content is unknown")


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a result, each object once."""
    found: dict[int, Tensor] = {}
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            found[id(item)] = item
        elif isinstance(item, (tuple, list)):
            pending.extend(item)
        elif isinstance(item, dict):
            pending.extend(item.values())
    return list(found.values())


def _copyable(value: Any) -> bool:
    """Whether a result is plain containers of plain values and of tensors without gradients."""
    if type(value) is Tensor:
        return not value.requires_grad
    if type(value) is dict:
        return all(_copyable(item) for item in value.values())
    return type(value) in _PLAIN or (type(value) in (tuple, list) and all(map(_copyable, value)))


def _copy(value: Any, done: dict[int, Tensor] | None = None) -> Any:
    """A result with tensors of its own; an object that occurs twice is copied once."""
    done = {} if done is None else done
    if isinstance(value, Tensor):
        if id(value) not in done:
            done[id(value)] = value.detach().clone()
        return done[id(value)]
    if isinstance(value, dict):
        return {name: _copy(item, done) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_copy(item, done) for item in value)
    return value
