"""Tokenizers of text encoders as files of a pack, for the `tokenizers` library alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

NORMALIZED = (
    None,
    {
        "type": "Sequence",
        "normalizers": [{"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True}],
    },
)


def tokenizer_file(
    name: str, tokenizer: Any, asked: Sequence[tuple[Any, int, Any]], texts: Sequence[str]
) -> tuple[dict[str, Any], bytes] | str:
    """(what a manifest says, the file) of a tokenizer of transformers; else why it cannot be one.

    Args:
        asked: for each of the texts, prompts of a pipeline, what the tokenizer was asked for, the length it filled up
            to, and what it gave: a file is told only where it gives the same.
    """
    own = getattr(tokenizer, "backend_tokenizer", None)
    if own is None:
        return f"{type(tokenizer).__name__} is not of the tokenizers library"
    (length,) = {length for _, length, _ in asked} if len({length for _, length, _ in asked}) == 1 else (0,)
    if not length:
        return "fills up to a length of the prompt's own"
    said = {
        "file": f"{name}.json",
        "length": length,
        "pad_id": int(tokenizer.pad_token_id or 0),
        "pad_token": str(tokenizer.pad_token or ""),
    }
    plain = json.loads(own.to_str()) | {"truncation": None, "padding": None}
    for before in NORMALIZED:
        file = _normalized(plain, before)
        if all(_gives(file, said, text, result) for text, (_, _, result) in zip(texts, asked, strict=True)):
            return said, file
    return "its file alone gives other tokens than the pipeline"


def _normalized(plain: dict[str, Any], before: dict[str, Any] | None) -> bytes:
    """The file, with what a pipeline does to texts ahead of the tokenizer's own normalizer."""
    own = plain.get("normalizer")
    if before is not None:
        own = {"type": "Sequence", "normalizers": [before] + ([own] if own else [])}
    return json.dumps(plain | {"normalizer": own}, sort_keys=True, ensure_ascii=False).encode()


def _gives(file: bytes, said: dict[str, Any], text: str, result: Any) -> bool:
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(file.decode())
    made.enable_truncation(said["length"])
    made.enable_padding(length=said["length"], pad_id=said["pad_id"], pad_token=said["pad_token"])
    encoding = made.encode(text)
    same = encoding.ids == result["input_ids"][0].tolist()
    return same and ("attention_mask" not in result or encoding.attention_mask == result["attention_mask"][0].tolist())
