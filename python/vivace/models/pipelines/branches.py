"""Guidance branches as a pipeline hands them to its network: rows of one batch, or calls of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Arguments whose first axis counts tokens, not samples.
_SHARED = frozenset(("image_rotary_emb", "img_ids", "txt_ids", "freqs_cis", "skip_layers"))


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Batch of a network call: that of its first tensor with axes."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.shape[0]
    return 0


def latent_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The latent in a network call: its first tensor with axes."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 1)


def numbers_of(generator: Any, pictures: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(seeds, numbers) of a call's pictures, for draws that are none of the pipeline's.

    By one generator: its seed, pictures 0, 1, ...; by one each: its seed, picture 0; without: seed 0.
    """
    if isinstance(generator, (list, tuple)):
        return tuple(each.initial_seed() for each in generator), (0,) * pictures
    return (0 if generator is None else generator.initial_seed(),) * pictures, tuple(range(pictures))


def half(value: Any, batch: int, which: int) -> Any:
    """Rows [which * batch/2, (which + 1) * batch/2) of every tensor of that batch, inside containers too."""
    if isinstance(value, Tensor):
        return value.chunk(2)[which] if value.dim() and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: value[name] if name in _SHARED else half(value[name], batch, which) for name in value}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(half(item, batch, which) for item in value)
    return value


def output_of(result: Any) -> Tensor:
    """The prediction in what a network returned: a tensor, the first of a tuple, or of an output object."""
    made: Tensor = result if isinstance(result, Tensor) else result[0]
    return made


def with_output(result: Any, prediction: Tensor) -> Any:
    """`result` with its prediction replaced."""
    if isinstance(result, Tensor):
        return prediction
    if isinstance(result, tuple):
        return (prediction, *result[1:])
    first = next(iter(result.keys()))
    return type(result)(**{**result, first: prediction})


def twice(prediction: Tensor) -> Tensor:
    """The same rows for both branches, [2n, ...]."""
    return prediction.unsqueeze(0).expand(2, *prediction.shape).flatten(0, 1)
