"""Checkpoints of other tools, made by hand in their formats (and by torchao itself where it is installed)."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tests.models.pipelines.test_denoiser import load
from tests.models.quantized.made import rounded
from torch import nn

import vivace
from vivace.errors import ModelError
from vivace.models.quantized.stand_in import block_names, place_of

NO_TORCHAO = "torchao is not installed (pip install torchao); its format, made by hand, is tested without it"


@pytest.fixture(scope="module")
def sd3():
    """(pipe, its linears in blocks by name)."""
    pipe = load("sd3")
    return pipe, linears_of(pipe.networks["transformer"])


@pytest.fixture(scope="module")
def dit(tiny_folder, tmp_path_factory):
    """A folder that opens as the native DiT, and the linears of its diffusers twin."""
    import diffusers

    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("dit") / "transformer")
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    return folder, linears_of(diffusers.AutoModel.from_pretrained(str(folder)))


def linears_of(network):
    blocks = {name: index for index, name in enumerate(block_names(network))}
    names = (name for name, module in network.named_modules() if isinstance(module, nn.Linear))
    inside = (name for name in names if place_of(name, blocks) and ".norm" not in name)
    return {name: network.get_submodule(name).weight.detach() for name in inside}


ROW = {"_type": "PerRow", "_data": {"dim": -1}}
SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}


def kwargs_of(granularity=ROW, mapping=SYMMETRIC, reduce_range=False):
    data = {"granularity": granularity, "mapping_type": mapping, "reduce_range": reduce_range}
    return {"_type": "QuantizeTensorToInt8Kwargs", "_data": data}


def torchao(folder, linears, change=lambda name, parts, told: None, smooth=False, groups=0):
    """A checkpoint as flatten_tensor_state_dict and save_file leave it, in two shards; and what it holds."""
    made = rounded(linears.items(), "", smooth=smooth, groups=groups).layers
    folder.mkdir(exist_ok=True)
    shards = [({}, {"tensor_names": []}) for _ in range(2)]
    for i, (name, layer) in enumerate(made.items()):
        tensors, metadata = shards[i % 2]
        parts = {"qdata": layer.weight, "scale": layer.weight_scale[:, None]}
        parts["zero_point"] = torch.zeros(len(layer.weight), 1, dtype=torch.int8)
        if smooth:
            parts["act_pre_scale"] = layer.smooth
        told = {"block_size": [1, layer.weight.shape[1]], "act_quant_kwargs": kwargs_of(), "reduce_range": False}
        if groups:
            parts["act_quant_scale"] = layer.x_scale[None]
        change(name, parts, told)
        tensors |= {f"{name}._weight_{part}": tensor.contiguous() for part, tensor in parts.items()}
        told = {"_type": "Int8Tensor", "_data": told, "_tensor_data_names": list(parts)}
        metadata[f"{name}.weight"] = json.dumps(told)
        metadata["tensor_names"].append(f"{name}.weight")
    shards[0][0]["proj_out.bias"] = torch.zeros(3)
    shards[0][1]["proj_out.bias"] = json.dumps({"_type": "Tensor"})
    shards[0][1]["tensor_names"].append("proj_out.bias")
    for i, (tensors, metadata) in enumerate(shards):
        metadata["tensor_names"] = json.dumps(metadata["tensor_names"])
        save_file(tensors, folder / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors", metadata=metadata)
    return made


def modelopt(folder, linears, change=lambda name, parts: None, algorithm="W8A8_SQ_PER_CHANNEL", smooth=True):
    """A component folder as Model-Optimizer's unified export leaves it."""
    made = rounded(linears.items(), "", smooth=smooth, groups=1).layers
    folder.mkdir(exist_ok=True)
    tensors = {"proj_out.weight": torch.ones(2, 2)}
    for name, layer in made.items():
        parts = {"weight": layer.weight, "weight_scale": layer.weight_scale, "input_scale": layer.x_scale[0]}
        if smooth:
            parts["pre_quant_scale"] = layer.smooth
        change(name, parts)
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    said = {"quant_algo": algorithm, "quant_method": "modelopt", "ignore": ["proj_out"]}
    (folder / "config.json").write_text(json.dumps({"_class_name": "X", "quantization_config": said}))
    return made


def opened(pipe, folder):
    return vivace.load(pipe.pipeline, quantized=folder).quantized


def equal(found, made):
    return all(
        torch.equal(found.layers[name].weight, layer.weight)
        and torch.equal(found.layers[name].weight_scale, layer.weight_scale)
        and (layer.smooth is None or torch.equal(found.layers[name].smooth, layer.smooth))
        and (layer.x_scale is None or torch.equal(found.layers[name].x_scale, layer.x_scale))
        for name, layer in made.items()
    )


@pytest.mark.parametrize("options", [{}, {"smooth": True}, {"groups": 1}], ids=["plain", "smoothed", "static"])
def test_a_torchao_checkpoint_of_a_pipeline(sd3, tmp_path, options):
    pipe, linears = sd3
    made = torchao(tmp_path / "transformer", linears, **options)
    found = opened(pipe, tmp_path)
    assert list(found.layers) and equal(found, made) and found.source["imported"] == "torchao"
    assert found.fingerprint == pipe.spec.fingerprint and found.static == bool(options.get("groups"))


def test_a_model_optimizer_checkpoint_of_a_pipeline(sd3, tmp_path):
    pipe, linears = sd3
    made = modelopt(tmp_path / "m", linears)
    found = opened(pipe, tmp_path / "m")
    assert equal(found, made) and found.static and found.source["imported"] == "Model-Optimizer"
    modelopt(tmp_path / "m", linears, lambda name, parts: parts.pop("pre_quant_scale"))
    with pytest.raises(ModelError, match="its numbers are not those of the model"):
        opened(pipe, tmp_path / "m")  # the factors are still in its weights


def test_the_native_dit_takes_both(dit, tmp_path):
    folder, linears = dit
    torchao(tmp_path / "a", linears)
    modelopt(tmp_path / "m", linears, smooth=False)
    for source in ("a", "m"):
        pipe = vivace.load(folder, quantized=tmp_path / source)
        assert sorted(pipe.quantized.layers) == sorted(
            f"blocks.{i}.{part}" for i in range(3) for part in ("qkv", "out", "up", "down")
        )
        weight = pipe.model.module.blocks[1].qkv.weight
        assert (pipe.quantized.layers["blocks.1.qkv"].dequantized() - weight).norm() < 0.02 * weight.norm()


def test_layers_outside_the_blocks_are_left_out(sd3, tmp_path):
    pipe, linears = sd3
    network = pipe.networks["transformer"]
    torchao(tmp_path / "a", {**linears, "context_embedder": network.context_embedder.weight.detach()})
    found = opened(pipe, tmp_path / "a")
    assert "outside the blocks" in found.kept["context_embedder"] and sorted(found.layers) == sorted(linears)


FIRST = "transformer_blocks.0.attn.to_q"
AO = {
    "weights only": (lambda parts, told: told.update(act_quant_kwargs=None), "act_quant_kwargs is missing"),
    "asymmetric": (
        lambda parts, told: told.update(act_quant_kwargs=kwargs_of(mapping={"_data": "ASYMMETRIC"})),
        "only SYMMETRIC",
    ),
    "by tensor": (
        lambda parts, told: told.update(act_quant_kwargs=kwargs_of({"_type": "PerTensor", "_data": {}})),
        "granularity of activations is 'PerTensor'",
    ),
    "groups": (lambda parts, told: told.update(block_size=[1, 8]), "block_size is"),
    "no block size": (lambda parts, told: told.pop("block_size"), "block_size is None"),
    "zero point": (lambda parts, told: parts["zero_point"].add_(3), "zero_point is not 0"),
    "no scale": (lambda parts, told: parts.pop("scale"), "tensor scale is missing"),
    "no numbers": (lambda parts, told: parts.pop("qdata"), "tensor qdata is missing"),
    "scale of zero": (lambda parts, told: parts["scale"].zero_(), "not positive"),
    "scales of another shape": (lambda parts, told: parts.update(scale=parts["scale"][:3]), "or one"),
    "kwargs of another kind": (lambda parts, told: told.update(act_quant_kwargs=[1]), "only SYMMETRIC"),
    "float numbers": (lambda parts, told: parts.update(qdata=parts["qdata"].float()), "needs int8"),
    "another model": (lambda parts, told: parts["qdata"].neg_(), "not those of the model"),
    "another shape": (
        lambda parts, told: (parts.update(qdata=parts["qdata"][:, :8]), told.update(block_size=[1, 8])),
        "the model's",
    ),
}


@pytest.mark.parametrize("case", AO)
def test_torchao_checkpoints_that_are_refused(sd3, tmp_path, case):
    pipe, linears = sd3
    change, message = AO[case]
    torchao(tmp_path / "a", linears, lambda name, parts, told: change(parts, told) if name == FIRST else None)
    with pytest.raises(ModelError, match=message) as caught:
        opened(pipe, tmp_path / "a")
    assert FIRST in str(caught.value) or case == "float numbers"


def test_folders_that_are_no_int8_checkpoint(sd3, tmp_path):
    pipe, linears = sd3
    with pytest.raises(ModelError, match=r"holds no \.safetensors file"):
        opened(pipe, tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="only diffusion_pytorch_model.bin, a pickle"):
        opened(pipe, tmp_path)
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    for source in (tmp_path, tmp_path / "x.safetensors"):
        with pytest.raises(ModelError, match="metadata `tensor_names` is missing"):
            opened(pipe, source)
    told = {"tensor_names": json.dumps(["x.weight"]), "x.weight": json.dumps({"_type": "Float8Tensor", "_data": {}})}
    save_file({"x._weight_qdata": torch.ones(2, 2)}, tmp_path / "x.safetensors", metadata=told)
    with pytest.raises(ModelError, match=r"x\.weight: is a 'Float8Tensor'; only Int8Tensor is read"):
        opened(pipe, tmp_path / "x.safetensors")
    for broken in ({"tensor_names": "{"}, {"tensor_names": "[3]"}, {"tensor_names": '["x.weight"]', "x.weight": "[]"}):
        save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors", metadata=broken)
        with pytest.raises(ModelError, match="is no JSON"):
            opened(pipe, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="is damaged"):
        opened(pipe, tmp_path)
    modelopt(tmp_path / "m", linears, algorithm="FP8")
    with pytest.raises(ModelError, match="quant_algo is 'FP8'; need W8A8_SQ_PER_CHANNEL"):
        opened(pipe, tmp_path / "m")
    for part in ("input_scale", "weight_scale"):
        modelopt(tmp_path / "m", linears, lambda name, parts, part=part: name == FIRST and parts.pop(part))
        with pytest.raises(ModelError, match=f"{FIRST}: tensor {part} is missing"):
            opened(pipe, tmp_path / "m")
    with pytest.raises(ModelError, match="no quantized weights there"):
        opened(pipe, tmp_path / "nothing")


def test_a_checkpoint_that_torchao_itself_made(sd3, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason=NO_TORCHAO)
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support", reason=NO_TORCHAO)
    pipe, linears = sd3
    network = load("sd3").networks["transformer"]
    config = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(network, config, filter_fn=lambda module, name: name in linears)
    tensors, metadata = support.flatten_tensor_state_dict(network.state_dict())
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    found = opened(pipe, tmp_path / "model.safetensors")
    assert sorted(found.layers) == sorted(linears) and not found.static
    for name, weight in linears.items():
        assert (found.layers[name].dequantized() - weight).norm() < 0.02 * weight.norm()
