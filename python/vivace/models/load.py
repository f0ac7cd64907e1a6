"""Model folders: what a model is, without torch (`open_model`), and the model itself (`load`).

A source is the name of a bundled model, a folder with `transformer/` and `scheduler/`, or a transformer folder. Beside
them may lie `names.json` (class names), `card.json` (defaults) and the `model_index.json` of diffusers (class names).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.engine.bind import ModelSpec
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.errors import ArgumentError, BackendError, ModelError
from vivace.models.checkpoint import fingerprint, read_json, read_object, weight_files
from vivace.models.dit_config import DiTConfig
from vivace.models.prompts import ClassName, Prompts

if TYPE_CHECKING:
    import torch

    from vivace.models.dit import DiT

WEIGHTS = Path(__file__).parent / "weights"
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


@dataclass(frozen=True)
class OpenModel:
    """A model folder that was read but for its weights.

    path: the transformer folder; schedule, prediction: from the scheduler's configuration; shape: of the latent,
    (C, H, W); names: of the classes, may be empty; card: defaults such as "guidance_scale", "solver", "steps";
    pixels: the latent is the picture (no VAE).
    """

    name: str
    path: Path
    config: DiTConfig
    schedule: NoiseSchedule
    prediction: str
    names: tuple[ClassName, ...] = ()
    card: Mapping[str, Any] = field(default_factory=dict)
    pixels: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Latent shape (C, H, W)."""
        return self.config.channels, self.config.size, self.config.size

    @property
    def classes(self) -> int:
        """Number of classes; also the id of the null label."""
        return self.config.classes

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return self.config.layers

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens down and across."""
        return self.config.grid

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of configuration and weights; about 0.5 s a GB, once. Raises ModelError."""
        return fingerprint(self.config.to_dict(), weight_files(self.path))

    @cached_property
    def prompts(self) -> Prompts:
        """Finds the class of a prompt."""
        return Prompts(self.names, self.classes)

    @cached_property
    def spec(self) -> ModelSpec:
        """What a plan is bound to."""
        return ModelSpec(
            name=self.name,
            fingerprint=self.fingerprint,
            prediction=self.prediction,
            latent_shape=self.shape,
            blocks=self.blocks,
            patch=(self.config.patch, self.config.patch),
            branches=("cond", "uncond"),
            conditioning="class",
            schedule=self.schedule,
            width=self.config.width,
            costs=self.config.costs,
        )


@dataclass(frozen=True)
class LoadedModel(OpenModel):
    """A model folder with its network on a device."""

    module: DiT = field(kw_only=True)


def bundled() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(path.name for path in WEIGHTS.iterdir() if (path / "transformer").is_dir()))


def open_model(source: str | PathLike[str], *, scheduler: Mapping[str, Any] | None = None) -> OpenModel:
    """Read everything of a model but its weights; needs no torch.

    Args:
        source: name of a bundled model, or a folder.
        scheduler: a diffusers scheduler configuration, used instead of the folder's.
    Raises: ModelError, naming the path and what to do.
    """
    root, transformer = _find(source)
    config = DiTConfig.from_dict(read_object(transformer / "config.json"), str(transformer / "config.json"))
    fields_, where = (scheduler, "scheduler") if scheduler is not None else _scheduler(root, transformer)
    card = read_object(root / "card.json") if (root / "card.json").is_file() else {}
    return OpenModel(
        name=root.name or str(source),
        path=transformer,
        config=config,
        schedule=NoiseSchedule.from_diffusers(dict(fields_)),
        prediction=prediction_of(fields_, where),
        names=_names(root, config.classes),
        card=card,
        pixels=config.channels in (1, 3) and not (root / "vae").is_dir(),
    )


def load(
    source: str | PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Read a model with its weights.

    Args:
        source, scheduler: as in `open_model`.
        device: where the weights go, "cpu", "cuda", ...
        dtype: of weights and computation, a floating torch dtype; None is float32.
    Raises: ModelError; BackendError without that device; ArgumentError for another dtype.
    """
    import torch

    from vivace.models.dit import DiT

    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(f"load: dtype {dtype!r}; need a floating-point torch dtype such as torch.float32")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"load: device {str(place)!r}, but torch finds no GPU; use device='cpu'")
    opened = open_model(source, scheduler=scheduler)
    module = DiT.load(opened.path, torch.float32 if dtype is None else dtype).to(place)
    return LoadedModel(**{item.name: getattr(opened, item.name) for item in fields(opened)}, module=module)


def prediction_of(scheduler: Mapping[str, Any], where: str = "scheduler") -> str:
    """What the network of a scheduler configuration predicts: "eps", "x0", "v" or "flow". Raises ModelError."""
    if str(scheduler.get("_class_name", "")).startswith("FlowMatch"):
        return "flow"
    named = scheduler.get("prediction_type", "epsilon")
    if named not in PREDICTIONS:
        raise ModelError(f"{where}: prediction_type is {named!r}; supported: {', '.join(PREDICTIONS)}")
    return PREDICTIONS[named]


def _find(source: str | PathLike[str]) -> tuple[Path, Path]:
    """The root folder and the transformer folder of a source."""
    root = Path(source)
    if isinstance(source, str) and source in bundled():
        root = WEIGHTS / source
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such model or folder"
        raise ModelError(f"{source}: {what}; need one of {', '.join(bundled())}, or a folder in the diffusers format")
    if (root / "transformer").is_dir():
        return root, root / "transformer"
    if (root / "unet").is_dir():
        raise ModelError(f"{root}: holds a UNet; only DiTTransformer2DModel folders are read natively")
    if (root / "config.json").is_file():
        return (root.parent, root) if root.name == "transformer" else (root, root)
    raise ModelError(f"{root}: neither transformer/ nor config.json in it; need a model in the diffusers format")


def _scheduler(root: Path, transformer: Path) -> tuple[dict[str, Any], str]:
    """The scheduler's configuration and its path."""
    for folder in dict.fromkeys((root / "scheduler", root, transformer)):
        path = folder / "scheduler_config.json"
        if path.is_file():
            return read_object(path), str(path)
    path = root / "scheduler" / "scheduler_config.json"
    raise ModelError(f"{path}: no such file; add it, or pass scheduler={{...}} with the model's training schedule")


def _names(root: Path, classes: int) -> tuple[ClassName, ...]:
    """Class names from names.json, or from the labels in model_index.json; () without either."""
    path = root / "names.json"
    if path.is_file():
        entries = read_json(path)
        try:
            names = tuple(ClassName(int(e["id"]), str(e["name"]), str(e.get("codepoint", ""))) for e in entries)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ModelError(f"{path}: need a list of {{id, name, codepoint}} ({error!r})") from None
    elif (root / "model_index.json").is_file():
        path = root / "model_index.json"
        labels = read_object(path).get("id2label") or {}
        try:
            names = tuple(ClassName(int(i), name.split(",")[0].strip()) for i, name in labels.items())
        except (AttributeError, ValueError) as error:
            raise ModelError(f"{path}: id2label must map class ids to names ({error})") from None
    else:
        return ()
    if any(not 0 <= entry.id < classes for entry in names) or len({entry.id for entry in names}) < len(names):
        raise ModelError(f"{path}: class ids must be distinct and within 0..{classes - 1}, as config.json says")
    return names
