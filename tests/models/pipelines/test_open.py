"""vivace.load of folders, hub names, pipeline objects and bare networks of diffusers."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.models.pipelines.test_prompts import stable_diffusion
from tests.models.pipelines.tiny import FAMILIES, embeddings, make

import vivace

SIZE = {"height": 16, "width": 16}
SHA = "0123456789abcdef0123456789abcdef01234567"


def words(pooled=True):
    """Embeddings of a prompt and of its negative for the tiny SD3."""
    found = {f"{sign}prompt_embeds": embeddings(1, 6, 16, seed=len(sign)) for sign in ("", "negative_")}
    pools = {f"{sign}pooled_prompt_embeds": embeddings(1, 16, seed=len(sign) + 2) for sign in ("", "negative_")}
    return found | (pools if pooled else {})


def latents(pipe, prompt=None, steps=2):
    plan = vivace.passes.apply_guidance(pipe.plan(steps), 4.0)
    return pipe.compile(plan)(words() if prompt is None else prompt, seed=1).latents


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny SD3 as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    make("sd3").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "sd3")


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A hub cache with org/tiny, offline."""
    root = tmp_path / "home" / "hub" / "models--org--tiny"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    for name in ("main", "v2"):
        (root / "refs" / name).write_text(SHA)
    for path in saved.rglob("*.*"):
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        link = root / "snapshots" / SHA / path.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "home"


@pytest.fixture
def unread(monkeypatch):
    """Fails when weights are read."""
    import diffusers

    def fail(*args, **kwargs):
        raise AssertionError("weights were read")

    for owner, name in ((torch, "load"), (diffusers.DiffusionPipeline, "from_pretrained"), (torch.nn.Module, "to")):
        monkeypatch.setattr(owner, name, fail)


def test_a_folder_gives_what_the_object_gives(saved):
    read, given = vivace.load(saved, call=SIZE), vivace.load(make("sd3"), call=SIZE)
    assert read.spec == given.spec
    assert torch.equal(latents(read), latents(given))
    assert vivace.load(str(saved), dtype="float64").compile(read.plan(2)).denoiser.dtype == torch.float64


@pytest.mark.parametrize("revision", [None, "main", "v2", SHA])
def test_a_name_is_found_in_the_hub_cache(hub, saved, revision):
    read = vivace.load("org/tiny", revision=revision, call=SIZE)
    assert read.spec == vivace.load(saved, call=SIZE).spec


def test_hf_hub_cache_names_the_cache_too(hub, monkeypatch, saved):
    monkeypatch.setenv("HF_HUB_CACHE", str(hub / "hub"))
    monkeypatch.setenv("HF_HOME", "/nowhere")
    assert vivace.load("org/tiny", call=SIZE).spec == vivace.load(saved, call=SIZE).spec


@pytest.mark.parametrize("name", [{"source": "org/other"}, {"source": "org/tiny", "revision": "v3"}])
def test_offline_a_name_that_is_not_in_the_cache_is_an_error(hub, name):
    with pytest.raises(vivace.ModelError, match="not in the hub cache.*HF_HUB_OFFLINE"):
        vivace.load(**name)


def test_without_a_network_a_name_that_is_not_in_the_cache_is_an_error(hub, monkeypatch):
    import diffusers

    def unreachable(name, **options):
        assert options["use_safetensors"]
        raise OSError("no route to host")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", unreachable)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(vivace.ModelError, match="cannot be downloaded.*no route"):
        vivace.load("org/other")


def test_pickled_weights_are_refused_before_anything_is_read(folder, unread):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(vivace.ModelError, match=r"vae/diffusion_pytorch_model.bin: pickled.*safe_serialization=True"):
        vivace.load(folder)


def test_pickles_of_a_hub_snapshot_are_refused_too(hub, unread):
    snapshot = hub / "hub" / "models--org--tiny" / "snapshots" / SHA / "transformer"
    (snapshot / "diffusion_pytorch_model.safetensors").rename(snapshot / "diffusion_pytorch_model.ckpt")
    with pytest.raises(vivace.ModelError, match="diffusion_pytorch_model.ckpt: pickled"):
        vivace.load("org/tiny")


def lose_weights(folder):
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


def lose_a_part(folder):
    shutil.rmtree(folder / "vae")


def damage_weights(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def run_code(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Mine"]}))


def name_nothing(folder):
    (folder / "transformer" / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (lose_weights, "transformer: no weights beside config.json"),
        (lose_a_part, "vae: no such folder"),
        (damage_weights, "damaged, or not a safetensors file"),
        (run_code, "code of their own"),
        (name_nothing, "cannot be read as JSON"),
    ],
)
def test_an_incomplete_folder_is_refused_before_weights_are_read(folder, unread, damage, fragment):
    damage(folder)
    with pytest.raises(vivace.ModelError, match=fragment):
        vivace.load(folder)


@pytest.fixture
def sharded(saved, tmp_path):
    """The folder with its transformer in shards."""
    root = shutil.copytree(saved, tmp_path / "sharded")
    shutil.rmtree(root / "transformer")
    make("sd3").transformer.save_pretrained(root / "transformer", max_shard_size="20KB")
    assert len(list((root / "transformer").glob("*.safetensors"))) > 1
    return root


def test_shards_are_read(sharded, saved):
    assert vivace.load(sharded, call=SIZE).spec.fingerprint == vivace.load(saved, call=SIZE).spec.fingerprint


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda where: {}, "no weight_map"),
        (lambda where: dict.fromkeys(where, "../../vae/diffusion_pytorch_model.safetensors"), "beside their index"),
        (lambda where: where | {"more": "lost.safetensors"}, "no such file"),
        (lambda where: where | {"more": next(iter(where.values()))}, "tensors not in"),
    ],
)
def test_a_damaged_index_is_refused(sharded, unread, change, fragment):
    (path,) = (sharded / "transformer").glob("*.index.json")
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))
    with pytest.raises(vivace.ModelError, match=fragment):
        vivace.load(sharded)


def test_a_variant_is_read_when_it_is_named(tmp_path):
    make("sd3").save_pretrained(tmp_path / "half", variant="fp16")
    assert vivace.load(tmp_path / "half", variant="fp16", call=SIZE).spec.blocks == 3
    with pytest.raises(vivace.ModelError, match="variant="):
        vivace.load(tmp_path / "half")


def test_a_folder_of_a_network_alone_is_a_bare_network(saved, tmp_path):
    from diffusers import SD3Transformer2DModel

    for source in (
        saved / "transformer",
        shutil.copytree(saved / "transformer", tmp_path / "x" / "transformer").parent,
    ):
        loaded = vivace.load(source)
        assert isinstance(loaded.networks["main"], SD3Transformer2DModel)
        assert loaded.spec.latent_shape == (4, 8, 8) and loaded.spec.schedule is None


def state_of(pipe):
    """Everything a pipeline and its parts hold."""

    def attributes(thing):
        return {name: (id(value), repr(value)[:200]) for name, value in vars(thing).items()}

    parts = {"pipeline": attributes(pipe), "config": repr(pipe.config)}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for path, module in part.named_modules():
                parts[name, path] = attributes(module)
            parts[name, "tensors"] = {
                key: (value.data_ptr(), value._version, value.sum().item()) for key, value in part.state_dict().items()
            }
        elif part is not None:
            parts[name] = attributes(part)
    return parts


@pytest.mark.parametrize("name", ["dit", "sd15", "sdxl", "sd3", "flux", "wan", "qwen"])
def test_a_pipeline_object_is_as_it_was(name):
    pipe = make(name)
    family = FAMILIES[name]
    call = {key: value for key, value in family.call.items() if key in ("height", "width", "num_frames")}
    before, random = state_of(pipe), torch.get_rng_state()
    loaded = vivace.load(pipe, call=call)
    session = loaded.compile(loaded.plan(2))
    session(1 if name == "dit" else None)
    if name in ("sd15", "sdxl", "sd3", "flux"):
        session.denoiser.to_latent(Image.new("RGB", (16, 16)))
    assert state_of(pipe) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(loaded.networks[part] is pipe.components[part] for part in family.denoisers)


def test_text_goes_through_the_pipelines_own_encoders():
    pipe = stable_diffusion()
    loaded = vivace.load(pipe)
    noise = torch.randn(1, *loaded.spec.latent_shape, generator=torch.Generator().manual_seed(5))
    session = loaded.compile(vivace.passes.apply_guidance(loaded.plan(3), 5.0))
    got = session("a red fox in the snow", latents=noise)
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 5.0, "num_inference_steps": 3, "latents": noise, "output_type": "latent"}
    wanted = pipe("a red fox in the snow", **call).images
    assert float((got.latents - wanted).norm() / wanted.norm()) < 1e-5
    assert torch.equal(session({"prompt": "a red fox in the snow"}, latents=noise).latents, got.latents)
    assert not torch.equal(session("a blue boat", latents=noise).latents, got.latents)
    assert loaded.prompting.cache.summary()["hits"] == 1  # the same text in other clothes


@pytest.mark.parametrize("name", ["sd3", "flux", "lumina2", "sana"])
def test_a_bare_network_gives_what_its_pipeline_gives(name):
    pipe = make(name)
    call = {
        key: value for key, value in FAMILIES[name].call.items() if key in ("height", "width", "use_resolution_binning")
    }
    whole = vivace.load(pipe, call=call)
    session = whole.compile(whole.plan(2))
    condition = session.denoiser.encode(None)
    bare = vivace.load(pipe.transformer, scheduler=pipe.scheduler, latent_shape=whole.spec.latent_shape)
    from vivace.models.pipelines.conditions import merge

    prompt = merge([condition.branch("cond")])
    wanted = session(None, seed=2).latents
    ours = bare.compile(whole.plan(2))
    got = ours(prompt, seed=2)
    assert float((got.latents - wanted).norm() / wanted.norm()) < 1e-6
    assert got.images == [] and got.receipt.one_by_one
    guided = vivace.passes.apply_guidance(whole.plan(2), 3.0)
    both = ours({"cond": prompt, "uncond": prompt}, plan=guided, seed=2).latents
    assert float((both - wanted).norm() / wanted.norm()) < 1e-5


def test_a_bare_network_without_a_scheduler_has_the_prediction_of_its_family():
    spec = vivace.load(make("sd15").unet).spec
    assert (spec.schedule, spec.prediction, spec.latent_shape, spec.blocks) == (None, "eps", (4, 8, 8), 5)
    assert vivace.load(make("flux").transformer).spec.latent_shape == (4096, 16)
    with pytest.raises(vivace.PromptError, match=r"lacks \['encoder_hidden_states'\] and has \['text'\]"):
        vivace.load(make("sd15").unet).compile(vivace.load(make("sd15"), call=SIZE).plan(2))({"text": 1})


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "flux_true_cfg"])
def test_the_spec_is_filled(name):
    family, pipe = FAMILIES[name], make(name)
    names = ("height", "width", "num_frames", "use_resolution_binning")
    spec = vivace.load(pipe, call={key: family.call[key] for key in names if key in family.call}).spec
    packed = len(spec.latent_shape) == 2
    assert spec.tokens() == (spec.latent_shape[0] if packed else 64 if "unet" in family.denoisers else spec.tokens())
    assert spec.schedule is not None and spec.prediction in ("eps", "v", "flow")
    assert spec.blocks >= 3 and len(spec.fingerprint) == 64
    assert spec.conditioning == ("class" if name == "dit" else "text")
    assert spec.branches == (("cond",) if name == "flux2" else ("cond", "uncond"))
    with pytest.raises(vivace.ShapeError):
        spec.tokens((*spec.latent_shape, 1))


def test_the_fingerprint_follows_the_weights_and_is_kept_while_they_stay(monkeypatch):
    from vivace.models.pipelines.open import Fingerprint

    runs, own = [], Fingerprint._hash
    monkeypatch.setattr(Fingerprint, "_hash", staticmethod(lambda *args: runs.append(1) or own(*args)))
    pipe = make("sd3")
    loaded = vivace.load(pipe, call=SIZE)
    first = loaded.spec.fingerprint
    assert loaded.spec.fingerprint == first == vivace.load(make("sd3"), call=SIZE).spec.fingerprint
    assert len(runs) == 2
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn.to_q.weight[0, 0] += 1.0
    assert loaded.spec.fingerprint != first


@pytest.mark.parametrize(
    ("options", "error", "fragment"),
    [
        ({"source": object()}, vivace.UnsupportedError, "a object object"),
        ({"source": torch.nn.Linear(2, 2)}, vivace.UnsupportedError, "Linear"),
        ({"source": lambda: make("sd3"), "dtype": "bfloat16"}, vivace.ArgumentError, "used as it is"),
        ({"source": lambda: make("sd3"), "call": {"heigth": 2}}, vivace.ArgumentError, "heigth"),
        ({"source": lambda: make("sd3"), "call": {"latents": 2}}, vivace.ArgumentError, "the plan and the session"),
        ({"source": lambda: make("sd3"), "latent_shape": (4, 8, 8)}, vivace.ArgumentError, "bare networks"),
        ({"source": lambda: make("sd3").transformer, "call": SIZE}, vivace.ArgumentError, "pipelines"),
        ({"source": lambda: make("sd3"), "scheduler": {}}, vivace.ArgumentError, "scheduler object"),
        ({"source": lambda: make("img2img_sd")}, vivace.UnsupportedError, "AutoPipelineForText2Image"),
        ({"source": "emoji", "variant": "fp16"}, vivace.ArgumentError, "variant"),
        ({"source": "nowhere"}, vivace.ModelError, "nowhere"),
        ({"source": "./no/where"}, vivace.ModelError, "no/where"),
    ],
)
def test_what_cannot_be_loaded_says_why(options, error, fragment):
    source = options["source"]
    with pytest.raises(error, match=fragment):
        vivace.load(**options | {"source": source() if type(source).__name__ == "function" else source})


def test_a_pipeline_that_cannot_run_says_what_to_give():
    with pytest.raises(vivace.UnsupportedError, match=r"LTXPipeline.*divisible by 32.*call=\{"):
        print(vivace.load(make("ltx"), call={"height": 20, "width": 32}).spec)


def test_another_scheduler_can_be_given():
    import diffusers

    pipe = make("hunyuan_dit")
    other = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    loaded = vivace.load(pipe, scheduler=other, call=SIZE | {"use_resolution_binning": False})
    assert loaded.plan(2).recipe.arguments.to_dict()["scheduler"]["_class_name"] == "DDIMScheduler"
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"


def test_the_page_on_loading_runs_as_it_is_written(tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[3] / "docs" / "loading.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "loading.md", "exec"), names)
    assert len(names["result"].images) == 2
