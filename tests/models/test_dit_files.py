"""Checkpoints: bit-exact round trips, errors that name the path and the way out, nothing half written."""

import json
import os
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from vivace.errors import ArgumentError, DtypeError, ModelError, OutputError, ShapeError
from vivace.models import checkpoint
from vivace.models.checkpoint import fingerprint, weight_files
from vivace.models.dit import DiT
from vivace.models.dit_config import DiTConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """A copy of the tiny model to damage."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def same(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("load", "save"), [("float16", "float16"), ("float32", "float16"), ("float64", "float16")])
def test_a_round_trip_keeps_every_bit(emoji_folder, tmp_path, load, save):
    DiT.load(emoji_folder, getattr(torch, load)).save(tmp_path / "saved", getattr(torch, save))
    assert same(load_file(tmp_path / "saved" / WEIGHTS), load_file(emoji_folder / WEIGHTS))


def test_diffusers_reads_what_we_save(tiny_folder, tmp_path):
    DiT.load(tiny_folder).save(tmp_path / "saved")
    theirs, info = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    original = diffusers.DiTTransformer2DModel.from_pretrained(tiny_folder)
    assert same(theirs.state_dict(), original.state_dict())
    ours = {name: value for name, value in original.config.items() if name[0] != "_"}
    assert ours == {name: value for name, value in theirs.config.items() if name[0] != "_"}


def test_shards_are_read(tiny_folder, tmp_path):
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tiny_folder)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(weight_files(tmp_path / "shards")) > 1
    assert same(DiT.load(tmp_path / "shards").state_dict(), DiT.load(tiny_folder).state_dict())
    marks = {fingerprint({}, weight_files(folder)) for folder in (tmp_path / "shards", tiny_folder)}
    assert len(marks) == 1
    lost = weight_files(tmp_path / "shards")[1]
    lost.unlink()
    with pytest.raises(ModelError, match=f"{lost.name}: no such file"):
        DiT.load(tmp_path / "shards")


def test_an_index_may_not_name_files_elsewhere(copy):
    index = copy / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"pos_embed.proj.weight": "../else.safetensors"}}))
    with pytest.raises(ModelError, match="beside their index"):
        DiT.load(copy)
    index.write_text(json.dumps({"weight_map": {"another": WEIGHTS}}))
    with pytest.raises(ModelError, match="in no shard: another"):
        DiT.load(copy)


def test_a_fingerprint_follows_config_and_weights_only(copy):
    before = fingerprint({"a": 1}, weight_files(copy))
    change(copy, lambda tensors: None)
    assert fingerprint({"a": 1}, weight_files(copy)) == before
    assert fingerprint({"a": 2}, weight_files(copy)) != before
    change(copy, lambda tensors: tensors["proj_out_1.bias"][0].add_(1e-3))
    assert fingerprint({"a": 1}, weight_files(copy)) != before


def test_a_stored_position_table_is_ignored(copy):
    change(copy, lambda tensors: tensors.update({"pos_embed.pos_embed": torch.zeros(1, 16, 32)}))
    assert DiT.load(copy).positions.abs().sum() > 0


def test_missing_folder_and_files_are_named(tmp_path, copy):
    with pytest.raises(ModelError, match=r"nowhere: no such folder"):
        DiT.load(tmp_path / "nowhere")
    (copy / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=rf"copy/{WEIGHTS}: no such file"):
        DiT.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"copy/config.json: no such file"):
        DiT.load(copy)


def test_damaged_files_are_named(copy):
    data = (copy / WEIGHTS).read_bytes()
    for damaged in (data[:-100], data[:50], b"", b"\xff" * 64):
        (copy / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ModelError, match=f"{WEIGHTS}: damaged"):
            DiT.load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json: cannot be read as JSON"):
        DiT.load(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="need an object"):
        DiT.load(copy)


def test_wrong_tensors_are_named(copy):
    def edit(tensors):
        del tensors["proj_out_1.bias"]
        tensors["unheard_of"] = torch.zeros(1)
        tensors["proj_out_2.weight"] = torch.zeros(3, 3)

    change(copy, edit)
    with pytest.raises(ModelError) as error:
        DiT.load(copy)
    for part in ("1 tensors missing: proj_out_1.bias", "unheard_of", r"proj_out_2.weight (3, 3) (need (32, 32))"):
        assert part in str(error.value)


def test_integer_weights_are_refused(copy):
    change(copy, lambda tensors: tensors.update({"proj_out_1.bias": torch.zeros(64, dtype=torch.int8)}))
    with pytest.raises(ModelError, match="tensor proj_out_1.bias is I8"):
        DiT.load(copy)


def test_pickles_are_refused_with_the_way_out(copy):
    (copy / WEIGHTS).unlink()
    (copy / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="run code.*save_pretrained"):
        DiT.load(copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_type", "layer_norm"),
        ("norm_elementwise_affine", True),
        ("activation_fn", "geglu"),
        ("out_channels", 5),
        ("num_layers", 0),
        ("num_layers", 2.0),
        ("in_channels", True),
        ("num_embeds_ada_norm", None),
        ("norm_eps", -1),
        ("sample_size", 9),
        ("attention_bias", 1),
        ("_class_name", "UNet2DModel"),
        ("cross_attention_dim", 768),
    ],
)
def test_unsupported_configuration_names_its_field(tiny_fields, field, value):
    with pytest.raises(ModelError, match=field):
        DiTConfig.from_dict({**tiny_fields, field: value})


def test_old_configurations_are_read(tiny_fields):
    old = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "only_cross_attention": False}
    assert DiTConfig.from_dict({**tiny_fields, **old}) == DiTConfig.from_dict(tiny_fields)
    assert DiTConfig.from_dict({}).width == 1152


def test_saving_replaces_a_model_but_nothing_else(tiny_folder, tmp_path):
    model = DiT.load(tiny_folder)
    model.save(tmp_path / "m")
    model.save(tmp_path / "m", torch.float16)
    assert load_file(tmp_path / "m" / WEIGHTS)["proj_out_1.bias"].dtype == torch.float16
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"other files \(thesis.tex\)"):
        model.save(tmp_path / "m")
    with pytest.raises(OutputError, match="is a file"):
        model.save(tmp_path / "m" / "thesis.tex")
    with pytest.raises(DtypeError, match="int8"):
        model.save(tmp_path / "other", torch.int8)
    assert os.listdir(tmp_path) == ["m"]


def test_a_save_that_fails_changes_nothing(tiny_folder, tmp_path, monkeypatch):
    model = DiT.load(tiny_folder)
    model.save(tmp_path / "m")
    before = (tmp_path / "m" / WEIGHTS).read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match="nothing was changed"):
        model.save(tmp_path / "m", torch.float16)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint.Path, "rename", full)
    with pytest.raises(OutputError, match="nothing was changed"):
        model.save(tmp_path / "m", torch.float16)
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


def test_bad_inputs_are_refused(tiny_folder):
    model = DiT.load(tiny_folder)
    x, t, labels = torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64)
    for bad in (x[:, :3], x[..., :7], x[0], torch.zeros(2, 4, 0, 8)):
        with pytest.raises(ShapeError, match="x has shape"):
            model(bad, t, labels)
    for bad in ((x, t[:1], labels), (x, t, labels[0]), (x, t, labels[:, :1]), (x, t, labels[:0])):
        with pytest.raises(ShapeError, match="labels"):
            model(*bad)
    with pytest.raises(DtypeError, match="float64"):
        model(x.double(), t, labels)
    with pytest.raises(DtypeError, match="labels"):
        model(x, t, labels.float())
    for bad in (-1, 11):
        with pytest.raises(ArgumentError, match="0..10"):
            model(x, t, labels + bad)
