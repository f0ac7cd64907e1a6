"""The native DiT computes what diffusers computes, on the bundled weights and on a random network."""

from functools import lru_cache

import diffusers
import pytest
import torch

from vivace.models.dit import DiT


@lru_cache
def peer(folder, dtype):
    return diffusers.DiTTransformer2DModel.from_pretrained(folder, torch_dtype=dtype).eval()


def inputs(model, n, size, branches=2):
    g = torch.Generator().manual_seed(n + size)
    x = torch.randn(n, model.config.channels, size, size, generator=g, dtype=torch.float64).to(model.dtype)
    t = 999 * torch.rand(n, generator=g, dtype=torch.float64)
    labels = torch.randint(0, model.config.classes, (branches, n), generator=g)
    labels[-1] = model.config.classes
    return x, t, labels


@torch.no_grad()
def expected(model, x, t, labels):
    channels = x.shape[1]
    return [model(x, t, class_labels=row).sample[:, :channels].double() for row in labels]


def worst(ours, theirs):
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("name", "size"), [("emoji", 32), ("emoji", 48), ("tiny", 8), ("tiny", 10)])
def test_float64_agrees_with_diffusers(request, name, size):
    folder = request.getfixturevalue(f"{name}_folder")
    model = DiT.load(folder, torch.float64)
    x, t, labels = inputs(model, 3, size)
    ours = model(x, t, labels)
    assert worst(ours, expected(peer(folder, torch.float64), x, t, labels)) < 1e-13
    assert len(ours) == 2
    assert all(out.is_contiguous() and out.shape == x.shape and out.dtype == x.dtype for out in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["emoji", "tiny"])
def test_error_in_a_narrow_dtype_is_at_most_twice_that_of_diffusers(request, name, dtype):
    folder = request.getfixturevalue(f"{name}_folder")
    model = DiT.load(folder, dtype)
    x, t, labels = inputs(model, 4, model.config.size)
    exact = expected(peer(folder, torch.float64), x.double(), t, labels)
    theirs = worst(expected(peer(folder, dtype), x, t, labels), exact)
    assert worst(model(x, t, labels), exact) <= 2 * theirs + torch.finfo(dtype).eps / 2


def test_float32_agrees_on_the_bundled_weights(emoji_folder):
    model = DiT.load(emoji_folder)
    x, t, labels = inputs(model, 4, 32)
    assert worst(model(x, t, labels), expected(peer(emoji_folder, torch.float32), x, t, labels)) < 2e-6


def test_of_a_learned_variance_only_the_mean_is_returned(tiny_folder):
    model = DiT.load(tiny_folder)
    x, t, labels = inputs(model, 2, 8, branches=1)
    assert model.config.out_channels == 8
    assert model(x, t, labels)[0].shape == (2, 4, 8, 8)


def test_other_configurations_agree(tmp_path):
    fields = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "num_layers": 1, "sample_size": 6}
    fields |= {"patch_size": 3, "num_embeds_ada_norm": 4, "attention_bias": False, "activation_fn": "gelu"}
    torch.manual_seed(1)
    theirs = diffusers.DiTTransformer2DModel(**fields).eval()
    theirs.save_pretrained(tmp_path / "m")
    model = DiT.load(tmp_path / "m", torch.float64)
    x, t, labels = inputs(model, 2, 6)
    assert worst(model(x, t, labels), expected(theirs.double(), x, t, labels)) < 1e-13


@pytest.mark.parametrize("size", [(8, 12), (14, 4)])
def test_tall_and_wide_latents_take_their_own_positions(tiny_folder, size):
    model, theirs = DiT.load(tiny_folder, torch.float64), peer(tiny_folder, torch.float64)
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    with torch.no_grad():
        assert worst([model.embed(x)], [theirs.pos_embed(x)]) < 1e-14
    (out,) = model(x, torch.tensor([3.0]), torch.tensor([[1]]))
    assert out.shape == x.shape


def test_the_parts_make_the_whole(tiny_folder):
    model = DiT.load(tiny_folder)
    x, t, labels = inputs(model, 3, 8)
    modulation = model.condition(t, labels)
    hidden = model.embed(x).repeat(2, 1, 1)
    for i in range(model.config.layers):
        before = hidden.clone()
        after = model.block(i, hidden, modulation)
        assert torch.equal(hidden, before), "a block must leave its input as it is: caches keep it"
        hidden = after
    parts = model.head(hidden, modulation, (8, 8))
    assert all(torch.equal(a, b) for a, b in zip(parts, model(x, t, labels), strict=True))


def test_an_empty_batch_gives_empty_predictions(tiny_folder):
    model = DiT.load(tiny_folder)
    outs = model(torch.zeros(0, 4, 8, 8), torch.zeros(0), torch.zeros(2, 0, dtype=torch.int64))
    assert [tuple(out.shape) for out in outs] == [(0, 4, 8, 8)] * 2
