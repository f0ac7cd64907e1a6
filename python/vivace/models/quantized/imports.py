"""Ready int8 checkpoints of torchao and of NVIDIA Model-Optimizer as quantized weights.

They hold the linear layers that run in 8 bits; the model itself is loaded beside them, and everything else is its own.
Read are safetensors whose own description says all that a layer needs; whatever else is refused by what is missing.
Sources: pytorch/ao@36027d8 torchao/prototype/safetensors/safetensors_support.py and
torchao/quantization/quantize_/workflows/int8/int8_tensor.py; NVIDIA/Model-Optimizer@a2fbac7
modelopt/torch/export/{quant_utils,unified_export_hf,convert_hf_config}.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vivace.errors import DtypeError, ModelError, ShapeError
from vivace.models.checkpoint import read_object
from vivace.models.dit import DiT
from vivace.models.quantized.files import paths_of, shown
from vivace.models.quantized.native import as_native
from vivace.models.quantized.stand_in import block_names, place_of
from vivace.models.quantized.weights import QuantizedLayer, QuantizedWeights

INT8_SMOOTHED = "W8A8_SQ_PER_CHANNEL"  # name in Model-Optimizer
FOLDERS = ("transformer", "unet")
OUTSIDE = "outside the blocks, where no rule of a plan reaches it"
OTHER = 0.5  # relative difference of weights from which they are another model's; rounding alone makes some 0.01
LOOKED_AT = 3  # layers compared with the model's

Tensors = dict[str, Tensor]


def is_checkpoint(path: Path) -> bool:
    """A folder, or a safetensors file without a description of ours beside it."""
    return path.is_dir() or (path.is_file() and path.suffix == ".safetensors" and not paths_of(path)[1].is_file())


def import_checkpoint(path: Path, network: Any, fingerprint: str) -> QuantizedWeights:
    """The int8 layers of a checkpoint for a network, which decides what they are named and which lie in its blocks.

    Raises: ModelError, naming the file or layer, what is missing and what to do.
    """
    folder = next((path / name for name in FOLDERS if (path / name).is_dir()), path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    if not files:
        some = next((file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth")), None)
        what = f"only {some}, a pickle, which can run code when opened" if some else "no .safetensors file"
        raise ModelError(f"{shown(folder)}: holds {what}; need an int8 checkpoint of torchao or Model-Optimizer")
    try:
        tensors, metadata = _read(files)
        details = _modelopt(folder, metadata)
        made = _torchao_layers(tensors, metadata) if details is None else _modelopt_layers(tensors, details)
        return _placed(made, network, fingerprint, "torchao" if details is None else "Model-Optimizer")
    except (ModelError, ShapeError, DtypeError) as error:
        raise ModelError(f"{shown(path)}: {error}") from None


def _read(files: list[Path]) -> tuple[Tensors, dict[str, str]]:
    """All tensors, mapped, and what the files say beside them."""
    tensors, metadata, names = dict[str, Tensor](), dict[str, str](), list[str]()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                inside = opened.keys()  # it is no mapping: it cannot be walked itself
                tensors |= {name: opened.get_tensor(name) for name in inside}
                said = opened.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file.name} is damaged, or not a safetensors file ({error}); copy it again") from None
        names += _json(said.get("tensor_names", "[]"), "tensor_names", list)
        metadata |= said
    return tensors, metadata | ({"tensor_names": json.dumps(names)} if names else {})


def _json(text: str, name: str, kind: type) -> Any:
    """A value of the metadata, which is JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise ModelError(f"its metadata {name!r:.60} is no JSON {kind.__name__}; save the checkpoint again")
    return value


# --- torchao ---------------------------------------------------------------------------------------------------------
def _torchao_layers(tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, QuantizedLayer]:
    """Layers of a state dict that `flatten_tensor_state_dict` made."""
    if "tensor_names" not in metadata:
        raise ModelError(
            "metadata `tensor_names` is missing, and config.json names no quantization of Model-Optimizer; need a file "
            "of torchao's flatten_tensor_state_dict and safetensors' save_file"
        )
    layers = {}
    for name in _json(metadata["tensor_names"], "tensor_names", list):
        told = _json(metadata.get(name, ""), name, dict)
        if told.get("_type") == "Tensor":
            continue
        if told.get("_type") != "Int8Tensor":
            raise ModelError(f"{name}: is a {told.get('_type')!r:.60}; only Int8Tensor is read")
        layer, dot, attribute = str(name).rpartition(".")
        if not dot or attribute != "weight":
            raise ModelError(f"{name}: is no weight of a layer")
        layers[layer] = _torchao_layer(layer, told.get("_data"), tensors)
    if not layers:
        raise ModelError("no Int8Tensor in it; quantize the model with Int8DynamicActivationInt8WeightConfig")
    return layers


def _torchao_layer(name: str, told: Any, tensors: Tensors) -> QuantizedLayer:
    parts = {key: tensors.get(f"{name}._weight_{key}") for key in ("qdata", "scale", "zero_point")}
    parts |= {key: tensors.get(f"{name}._weight_{key}") for key in ("act_pre_scale", "act_quant_scale")}
    qdata, scale = (_needed(name, key, parts[key]) for key in ("qdata", "scale"))
    if not isinstance(told, dict) or qdata.dim() != 2:
        raise ModelError(f"{name}: its description or shape {tuple(qdata.shape)} is not that of a linear layer")
    columns, depth = qdata.shape
    if told.get("block_size") not in ([1, depth], [columns, depth]):
        raise ModelError(f"{name}: block_size is {told.get('block_size')!r:.40}; need one scale a row or one in all")
    if parts["zero_point"] is not None and bool(parts["zero_point"].any()):
        raise ModelError(f"{name}: zero_point is not 0; only symmetric weights are read")
    return QuantizedLayer(
        qdata,
        _vector(name, "scale", scale, columns),
        None if parts["act_pre_scale"] is None else _vector(name, "act_pre_scale", parts["act_pre_scale"], depth),
        _torchao_activations(name, told, parts["act_quant_scale"]),
    )


def _torchao_activations(name: str, told: Mapping[str, Any], scale: Tensor | None) -> Tensor | None:
    """The static scale [1]; None: by token."""
    found = told.get("act_quant_kwargs")
    if found is None:
        raise ModelError(
            f"{name}: act_quant_kwargs is missing: only weights are in 8 bits; quantize with "
            "Int8DynamicActivationInt8WeightConfig"
        )
    kwargs = found.get("_data") if isinstance(found, dict) else None
    nested = (
        {key: value for key, value in kwargs.items() if isinstance(value, dict)} if isinstance(kwargs, dict) else {}
    )
    mapping, granularity = nested.get("mapping_type", {}), nested.get("granularity", {})
    if mapping.get("_data") != "SYMMETRIC":
        raise ModelError(f"{name}: activations are {mapping.get('_data')!r:.40}; only SYMMETRIC ones are read")
    if scale is not None:
        if told.get("reduce_range") or (isinstance(kwargs, dict) and kwargs.get("reduce_range")):
            raise ModelError(f"{name}: reduce_range with static activations is not read; quantize without it")
        return _vector(name, "act_quant_scale", scale, 1)
    if granularity.get("_type") != "PerRow" or granularity.get("_data") not in ({"dim": -1}, {}, None):
        kind = granularity.get("_type")
        raise ModelError(f"{name}: granularity of activations is {kind!r:.40}; need PerRow, or an act_quant_scale")
    return None


# --- NVIDIA Model-Optimizer ------------------------------------------------------------------------------------------
def _modelopt(folder: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What config.json, hf_quant_config.json or the files say of a quantization by Model-Optimizer; None: nothing."""
    said: Any = None
    if folder.is_dir() and (folder / "config.json").is_file():
        said = read_object(folder / "config.json").get("quantization_config")
    if said is None and folder.is_dir() and (folder / "hf_quant_config.json").is_file():
        said = read_object(folder / "hf_quant_config.json").get("quantization")
        return said if isinstance(said, dict) else {}
    if said is None and "quantization_config" in metadata:
        said = _json(metadata["quantization_config"], "quantization_config", dict)
    return said if isinstance(said, dict) and (said.get("quant_method") == "modelopt" or "quant_algo" in said) else None


def _modelopt_layers(tensors: Tensors, told: Mapping[str, Any]) -> dict[str, QuantizedLayer]:
    """Layers with int8 weights."""
    algorithm = told.get("quant_algo")
    if algorithm != INT8_SMOOTHED:
        raise ModelError(f"quant_algo is {algorithm!r:.60}; need {INT8_SMOOTHED}, int8 with one scale a channel")
    layers = {}
    for key, weight in tensors.items():
        name, dot, attribute = key.rpartition(".")
        if attribute != "weight" or not dot or weight.dtype != torch.int8:
            continue
        if weight.dim() != 2:
            raise ModelError(f"{name}: weight has shape {tuple(weight.shape)}; only linear layers are read")
        columns, depth = weight.shape
        smooth = tensors.get(f"{name}.pre_quant_scale")
        parts = {part: _needed(name, part, tensors.get(f"{name}.{part}")) for part in ("weight_scale", "input_scale")}
        layers[name] = QuantizedLayer(
            weight,
            _vector(name, "weight_scale", parts["weight_scale"], columns),
            None if smooth is None else _vector(name, "pre_quant_scale", smooth, depth),
            _vector(name, "input_scale", parts["input_scale"], 1),
        )
    if not layers:
        raise ModelError("no int8 weight in it; export the model after mtq.quantize")
    return layers


# --- both ------------------------------------------------------------------------------------------------------------
def _needed(name: str, part: str, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ModelError(f"{name}: tensor {part} is missing")
    return tensor


def _vector(name: str, part: str, tensor: Tensor, size: int) -> Tensor:
    """A scale for each of `size`, or one for all, as float32 [size]. Raises ModelError."""
    if tensor.numel() not in (1, size) or not tensor.is_floating_point():
        raise ModelError(f"{name}: {part} is {tensor.dtype} {tuple(tensor.shape)}; need {size} floats, or one")
    flat = tensor.float().reshape(-1).expand(size).contiguous()
    if not bool(((flat > 0) & flat.isfinite()).all()):
        raise ModelError(f"{name}: {part} holds NaN, infinity or a number that is not positive")
    return flat


def _placed(layers: dict[str, QuantizedLayer], network: Any, fingerprint: str, tool: str) -> QuantizedWeights:
    """The layers under the names of the network; those outside its blocks are left out."""
    weights = QuantizedWeights("int8", fingerprint, layers, source={"imported": tool})
    if isinstance(network, DiT):
        found = as_native(weights, network.config)
        if found is None:
            raise ModelError("query, key and value are not quantized alike, or no layer is a DiT's; load the pipeline")
        weights = found
    else:
        blocks = {name: index for index, name in enumerate(block_names(network))}
        inside = {name: layer for name, layer in layers.items() if place_of(name, blocks) is not None}
        kept = {name: OUTSIDE for name in layers if name not in inside}
        weights = QuantizedWeights("int8", fingerprint, inside, kept=kept, source=weights.source)
    _compare(weights, network)
    return weights


def _compare(weights: QuantizedWeights, network: Any) -> None:
    """Raise ModelError where a layer's numbers are far from the model's; names and shapes are checked by the caller."""
    names = list(weights.layers)
    for name in names[:: max(1, len(names) // LOOKED_AT)]:
        try:
            own = network.get_submodule(name).weight.detach().float().cpu()
        except AttributeError:
            continue
        made = weights.layers[name].dequantized()
        if made.shape == own.shape and float((made - own).norm()) > OTHER * float(own.norm()):
            raise ModelError(f"{name}: its numbers are not those of the model that was loaded; load the model it is of")
