"""Where a model lies, a folder or a snapshot in the hub cache; that its weights are safetensors, before any is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vivace.errors import ModelError
from vivace.models.checkpoint import PICKLES, read_object
from vivace.models.load import bundled

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
NETWORK_FOLDERS = ("transformer", "unet")
NATIVE = ("DiTPipeline", "DiTTransformer2DModel")  # read by vivace.models.load


def is_hub_id(source: str | PathLike[str]) -> bool:
    """A name such as "org/name" that is no path here."""
    return isinstance(source, str) and HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def is_foreign(source: Any) -> bool:
    """A source that is opened here: an object, a hub id, or a folder of anything but a DiT whose latents are pixels."""
    if not isinstance(source, (str, PathLike)):
        return True
    if is_hub_id(source):
        return True
    if str(source) in bundled():
        return False
    root = Path(source)
    for path in (root / "model_index.json", *(root / n / "config.json" for n in NETWORK_FOLDERS), root / "config.json"):
        if path.is_file():
            return read_object(path).get("_class_name") not in NATIVE or (root / "vae").is_dir()
    return False


def resolve(source: str | PathLike[str], *, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a source. A hub id is looked up in the cache first, then fetched unless HF_HUB_OFFLINE says no.

    Args:
        revision: branch, tag or commit of a hub id; None is main. variant: of the weight files, such as "fp16".
    Raises: ModelError.
    """
    if not is_hub_id(source):
        folder = Path(source)
        if not folder.is_dir():
            raise ModelError(f"{source}: no such folder, and no name on the hub (org/name); check the path")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, cache = str(source), hub_cache()
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    where = f"{name}{f' (revision {revision})' if revision else ''}: not in the hub cache {cache}"
    if is_offline():
        raise ModelError(f"{where}, and HF_HUB_OFFLINE is set; unset it to download, or pass a local folder")
    return _download(name, revision, variant, cache, where)


def hub_cache() -> Path:
    """The cache folder that HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME name now; theirs by default."""
    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(base, "huggingface")).expanduser() / "hub"


def is_offline() -> bool:
    """HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbid the network."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def check_weights(root: Path, variant: str | None = None) -> None:
    """Every part of the model has safetensors files that can be opened; nothing else is opened.

    Raises: ModelError naming the file and the way out.
    """
    for folder in _parts(root):
        config = read_object(folder / "config.json")
        if not (config.get("_class_name") or config.get("architectures") or config.get("model_type")):
            continue
        _check_part(folder, variant)


def _parts(root: Path) -> Iterator[Path]:
    """Folders of the parts that have weights: those that model_index.json names, the networks, or the folder itself."""
    index = root / "model_index.json"
    if index.is_file():
        fields = read_object(index)
        if not isinstance(fields.get("_class_name"), str):
            raise ModelError(
                f"{index}: _class_name is {fields.get('_class_name')!r}; pipelines with code of their own are not run"
            )
        for name, entry in fields.items():
            known = isinstance(entry, list) and len(entry) == 2 and all(entry) and not name.startswith("_")
            if known and not str(entry[1]).endswith(("Tokenizer", "TokenizerFast", "Processor", "Scheduler")):
                if not (root / name).is_dir():
                    raise ModelError(f"{root / name}: no such folder; {index.name} names it, copy the whole model")
                if (root / name / "config.json").is_file():
                    yield root / name
        return
    found = [root / name for name in NETWORK_FOLDERS if (root / name / "config.json").is_file()]
    yield from found or [root]


def _check_part(folder: Path, variant: str | None) -> None:
    files = sorted(file.name for file in folder.iterdir())
    mark = f".{variant}" if variant else ""
    indexes = [n for n in files if n.endswith((f".safetensors.index{mark}.json", f"{mark}.safetensors.index.json"))]
    indexes = [name for name in indexes if variant or name.count(".") == 3]
    single = [
        name for name in files if re.fullmatch(rf"[^.]+{re.escape(mark)}\.safetensors", name) and "-of-" not in name
    ]
    if indexes and not single:
        _check_index(folder, folder / indexes[0])
    elif single:
        _keys(folder / single[0])
    else:
        _refuse(folder, files, variant)


def _check_index(folder: Path, index: Path) -> None:
    """An index names files beside it that together hold every tensor it lists."""
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ModelError(f"{index}: has no weight_map of tensor names to files; copy or download it again")
    for name in sorted(set(where.values())):
        path = folder / name
        if path.parent != folder or path.suffix != ".safetensors":
            raise ModelError(f"{index}: names {name}; shards are safetensors files beside their index")
        if not path.is_file():
            raise ModelError(f"{path}: no such file; {index.name} names it, copy all shards")
        lost = sorted({tensor for tensor, file in where.items() if file == name} - _keys(path))
        if lost:
            raise ModelError(f"{index}: tensors not in {name}: {', '.join(lost[:3])}; copy the shards again")


def _refuse(folder: Path, files: list[str], variant: str | None) -> None:
    """The error for a part without the safetensors files that are wanted."""
    pickles = [name for name in files if any(Path(name).match(pattern) for pattern in PICKLES)]
    others = [name for name in files if name.endswith(".safetensors")]
    if pickles and not others:
        raise ModelError(
            f"{folder / pickles[0]}: pickled weights, which can run code when opened, and no safetensors beside them; "
            "convert once, in a sandbox: diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=False)"
            ".save_pretrained(new_folder, safe_serialization=True)"
        )
    if others:
        asked = f"variant {variant!r}" if variant else "files without a variant"
        raise ModelError(f"{folder}: has {', '.join(others[:3])}, asked for {asked}; pass the variant= that is there")
    raise ModelError(
        f"{folder}: no weights beside config.json; need safetensors files, copy or download the whole model"
    )


def _keys(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="np") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged, or not a safetensors file ({error}); copy or download it again") from None


def _download(name: str, revision: str | None, variant: str | None, cache: Path, where: str) -> Path:
    """A pipeline from the hub, safetensors only."""
    from diffusers import DiffusionPipeline

    try:
        return Path(
            DiffusionPipeline.download(
                name, revision=revision, variant=variant, cache_dir=cache, use_safetensors=True, trust_remote_code=False
            )
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{where}, and it cannot be downloaded ({error}); check name and network") from error
