"""VAE decode: as it is, in tiles on request, and in channels-last bfloat16 where that is measured to be faster."""

from __future__ import annotations

import copy
import math
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from vivace.errors import ArgumentError, UnsupportedError
from vivace.models.pipelines.module_state import Serials, is_offloaded, module_state
from vivace.models.pipelines.views import fork, view

T = TypeVar("T")
Measure = Callable[[Callable[[], T], torch.device], tuple[float, T]]

PRECISIONS = ("exact", "auto", "bf16")
WHOLE_TILES = 4  # tiled="auto" decodes in one piece up to this many tiles' area
_ENCODING = ("encoder", "quant_conv")  # parts that no decode uses
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class DecodeOptions:
    """How a VAE decodes.

    precision: "exact": the VAE's own dtype and layout, the same bits; "bf16": bfloat16, channels last; "auto": of the
    two the one that is faster for this VAE, latent shape, dtype and device, measured on the first such decode.
    tiled: True: in tiles; False: as the VAE is set; "auto": in tiles above four tiles' area, or when memory runs out.

    The options own what was measured and the bfloat16 copies of decoder weights, and drop them when they go; use one
    object for many calls. Thread-safe. Raises: ArgumentError.
    """

    precision: str = "exact"
    tiled: bool | str = False
    _known: _Known = field(default_factory=lambda: _Known(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ArgumentError(f"DecodeOptions: precision is {self.precision!r}; give one of {', '.join(PRECISIONS)}")
        if self.tiled not in (True, False, "auto"):
            raise ArgumentError(f"DecodeOptions: tiled is {self.tiled!r}; give True, False or 'auto'")

    @property
    def extra_bytes(self) -> int:
        """Bytes of the bfloat16 copies held now."""
        return sum(record.bytes for record in self._known.records())


@dataclass
class DecodeReport:
    """What the last decode did, for the receipt; filled while it runs.

    exact_ms, bf16_ms: measured for this shape; psnr_db: of bfloat16 against exact where both ran, pictures in [-1, 1];
    extra_bytes: held by the bfloat16 copy of this VAE.
    """

    decodes: int = 0
    dtype: str = ""
    layout: str = ""
    tiled: bool = False
    reason: str = "nothing was decoded"
    exact_ms: float | None = None
    bf16_ms: float | None = None
    psnr_db: float | None = None
    extra_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def measure_ms(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Milliseconds of `work`, and its result: the least of up to three runs, of fewer once half a second is spent."""
    best, spent = math.inf, 0.0
    for _ in range(3):
        _wait(device)
        began = time.perf_counter()
        result = work()
        _wait(device)
        ms = (time.perf_counter() - began) * 1e3
        best, spent = min(best, ms), spent + ms
        if spent > 500.0:
            break
    return best, result


def decoder_view(vae: Any, options: DecodeOptions, *, measure: Measure[Any] = measure_ms) -> tuple[Any, DecodeReport]:
    """A stand-in of `vae` whose `decode` follows `options`, and the report it fills. `vae` itself is not changed.

    What comes out has the dtype of the latents; in bfloat16 it is contiguous as well. Latents [B, C, H, W], or
    [B, C, F, H, W] of video (channels_last_3d).

    Args:
        vae: an autoencoder of diffusers, or any module with `decode`; pass the pipeline's own, not a copy of it.
        measure: times one way of decoding, `measure_ms` by default.
    Raises: UnsupportedError: tiles of a VAE that has none; bfloat16 of weights that offload hooks move; anything but
        the default for a VAE whose `decode` was replaced on the object.
    """
    _refuse(vae, options)
    report = DecodeReport()
    return view(vae, decode=_Decoding(vae, options, report, measure).decode), report


def _refuse(vae: Any, options: DecodeOptions) -> None:
    """Raise for options that this VAE cannot follow."""
    if "decode" in vars(vae) and options != DecodeOptions():
        raise UnsupportedError(
            f"decode: the decode of this {type(vae).__name__} was replaced on the object (compiled, perhaps), and what "
            "replaced it keeps its own weights; use DecodeOptions(), or take the replacement away: del vae.decode"
        )
    if options.tiled is True and not _can_tile(vae):
        raise UnsupportedError(
            f"decode: {type(vae).__name__} cannot decode in tiles; use tiled=False, or 'auto' to tile where possible"
        )
    if options.precision == "bf16" and is_offloaded(vae):
        raise UnsupportedError(
            "decode: offload hooks move the VAE's weights, so no bfloat16 copy can be kept; use precision='exact' "
            "or 'auto', or take the VAE out of the offload"
        )


@dataclass(frozen=True)
class _Choice:
    """What was measured for one shape."""

    exact_ms: float
    bf16_ms: float
    psnr_db: float

    @property
    def bf16(self) -> bool:
        return self.bf16_ms < self.exact_ms

    def __str__(self) -> str:
        """The reason given in the report."""
        faster = "bf16, channels last" if self.bf16 else "exact"
        return f"{faster}: {self.bf16_ms:.1f} ms in bf16, {self.exact_ms:.1f} ms exact; {self.psnr_db:.1f} dB apart"


class _Record:
    """What is known of one VAE: the choices by shape, and the bfloat16 copy of the parts that decode."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.choices: dict[tuple[Any, ...], _Choice] = {}
        self.bytes = 0
        self._serials = Serials()
        self._copies: dict[str, Any] = {}
        self._state: list[bytes] = []

    def copies(self, vae: Any) -> dict[str, Any]:
        """The bfloat16, channels-last copies of the VAE's parts by name; made again when the weights changed."""
        parts = {name: part for name, part in vae.named_children() if name not in _ENCODING}
        with self.lock:
            state = [module_state(part, self._serials) for part in parts.values()]
            if state != self._state:
                self._copies = {name: _lowered(part) for name, part in parts.items()}
                self._state, self.bytes = state, sum(map(_bytes, self._copies.values()))
            return self._copies

    def drop(self) -> None:
        """Forget the copies."""
        self._copies, self._state, self.bytes = {}, [], 0


class _Known:
    """Records by VAE (by its decoder, which stand-ins share), kept no longer than the VAE lives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()

    def record(self, vae: Any) -> _Record:
        with self._lock:
            return self._records.setdefault(getattr(vae, "decoder", None) or vae, _Record())

    def records(self) -> list[_Record]:
        with self._lock:
            return list(self._records.values())


class _Decoding:
    """The `decode` of one stand-in."""

    def __init__(self, vae: Any, options: DecodeOptions, report: DecodeReport, measure: Measure[Any]) -> None:
        self.vae, self.options, self.report, self.measure = vae, options, report, measure
        self.record = options._known.record(vae)
        self.moved = is_offloaded(vae)

    def decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The VAE's decode, in tiles when asked for; "auto" tries tiles when the whole does not fit."""
        asked = self.options.tiled
        tiled = asked is True or (asked == "auto" and _can_tile(self.vae) and _tile_count(self.vae, z) > WHOLE_TILES)
        try:
            return self._decode(z, tiled, args, kwargs)
        except torch.OutOfMemoryError:
            if tiled or asked != "auto" or not _can_tile(self.vae):
                raise
        output = self._decode(z, True, args, kwargs)
        self.report.reason += "; in tiles because memory ran out"
        return output

    def _decode(self, z: Tensor, tiled: bool, args: Any, kwargs: Any) -> Any:
        def run(low: bool) -> Any:
            own = fork(self.vae, **(self.record.copies(self.vae) if low else {}))
            if tiled:
                own.enable_tiling()
            if not low:
                return own.decode(z, *args, **kwargs)
            lowered = z.to(torch.bfloat16).contiguous(memory_format=_layout_of(z))
            return _as_called(own.decode(lowered, *args, **kwargs), z.dtype)

        low, reason = self._fixed(z)
        choice, output = None, None
        if low is None:
            key = tuple(z.shape), z.dtype, z.device, tiled
            choice, output = self._measured(key, run, _Draws(z.device, [*args, *kwargs.values()]))
            low, reason = choice.bf16, str(choice)
        output = run(low) if output is None else output
        self._fill(z, tiled, low, reason, choice)
        return output

    def _fixed(self, z: Tensor) -> tuple[bool | None, str]:
        """(whether in bfloat16, why) where nothing is to be measured; (None, "") otherwise."""
        if self.options.precision != "auto":
            return self.options.precision == "bf16", f"precision={self.options.precision!r}"
        if self.moved:
            return False, "exact: offload hooks move the weights"
        if z.dtype == torch.float64:
            return False, "exact: float64 asks for precision"
        if torch.is_grad_enabled() and z.requires_grad:
            return False, "exact: gradients are recorded"
        return None, ""

    def _measured(self, key: Any, run: Callable[[bool], Any], draws: _Draws) -> tuple[_Choice, Any]:
        """The choice for a shape, with the chosen output where it was made just now."""
        with self.record.lock:
            known = self.record.choices.get(key)
            if known is not None:
                return known, None
            self.record.copies(self.vae)  # made before the clock runs
            exact_ms, exact = self.measure(lambda: draws.again(run, False), key[2])
            bf16_ms, low = self.measure(lambda: draws.again(run, True), key[2])
            choice = _Choice(exact_ms, bf16_ms, _psnr(_picture(low), _picture(exact)))
            self.record.choices[key] = choice
            if not any(kept.bf16 for kept in self.record.choices.values()):
                self.record.drop()
            return choice, low if choice.bf16 else exact

    def _fill(self, z: Tensor, tiled: bool, low: bool, reason: str, choice: _Choice | None) -> None:
        report = self.report
        on = tiled or bool(getattr(self.vae, "use_tiling", False))
        report.decodes += 1
        report.dtype = "bfloat16" if low else str(z.dtype).removeprefix("torch.")
        report.layout = str(_layout_of(z) if low else _weights_layout(self.vae)).removeprefix("torch.")
        report.tiled = on and _tile_count(self.vae, z) > 1
        report.reason, report.extra_bytes = reason, self.record.bytes
        if choice is not None:
            report.exact_ms, report.bf16_ms, report.psnr_db = choice.exact_ms, choice.bf16_ms, choice.psnr_db


class _Draws:
    """Generators a decode may draw from: each way of decoding starts from the same states and leaves the same."""

    def __init__(self, device: torch.device, arguments: list[Any]) -> None:
        found = [torch.default_generator]
        if device.type == "cuda":
            found.append(torch.cuda.default_generators[device.index or 0])
        for argument in arguments:
            items = argument if isinstance(argument, (list, tuple)) else [argument]
            found += [item for item in items if isinstance(item, torch.Generator)]
        self.states = [(generator, generator.get_state()) for generator in found]

    def again(self, run: Callable[[bool], Any], low: bool) -> Any:
        for generator, state in self.states:
            generator.set_state(state)
        return run(low)


def _can_tile(vae: Any) -> bool:
    """Whether the VAE has the machinery, not only the switch."""
    return hasattr(vae, "use_tiling") and any(hasattr(vae, name) for name in ("tiled_decode", "_tiled_decode"))


def _tile_count(vae: Any, z: Tensor) -> float:
    """Area of the latent in tiles, more than 1 where one of its sides exceeds a tile; 1 where tiles are unknown."""
    ratio = getattr(vae, "spatial_compression_ratio", 1)
    sides = []
    for side, length in (("height", z.shape[-2]), ("width", z.shape[-1])):
        latent = getattr(vae, "tile_latent_min_size", None) or getattr(vae, f"tile_latent_min_{side}", None)
        sample = getattr(vae, f"tile_sample_min_{side}", None)
        size = latent or (sample // ratio if sample else length)
        sides.append(length / size)
    return math.prod(sides) if math.prod(sides) > 1 else max(1.0, *sides)


def _layout_of(z: Tensor) -> torch.memory_format:
    return _LAYOUTS.get(z.dim(), torch.contiguous_format)


def _weights_layout(vae: Any) -> torch.memory_format:
    """The layout of the decoder's convolutions."""
    for weight in getattr(vae, "decoder", vae).parameters():
        layout = _layout_of(weight)
        if weight.dim() in _LAYOUTS and weight.shape[1] > 1 and not weight.is_contiguous():
            return layout if weight.is_contiguous(memory_format=layout) else torch.contiguous_format
    return torch.contiguous_format


def _lowered(part: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module in bfloat16, convolution weights channels last; nothing is held twice on the way."""
    made: dict[int, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in (*part.parameters(), *part.buffers()):
            kept = tensor.detach().to(torch.bfloat16 if tensor.is_floating_point() else tensor.dtype, copy=True)
            kept = kept.contiguous(memory_format=_layout_of(kept))
            made[id(tensor)] = torch.nn.Parameter(kept, False) if isinstance(tensor, torch.nn.Parameter) else kept
        return copy.deepcopy(part, made)


def _bytes(part: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*part.parameters(), *part.buffers()))


def _picture(output: Any) -> Tensor:
    picture: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return picture


def _as_called(output: Any, dtype: torch.dtype) -> Any:
    """An output whose picture is contiguous and of `dtype`."""
    picture = _picture(output).to(dtype).contiguous()
    if isinstance(output, tuple):
        return (picture, *output[1:])
    output.sample = picture
    return output


def _psnr(low: Tensor, exact: Tensor) -> float:
    """10 log10(2^2 / mean square error) in dB over all samples, for pictures in [-1, 1]."""
    error = float((low.float() - exact.float()).square().mean())
    return 10.0 * math.log10(4.0 / error) if error else math.inf


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
