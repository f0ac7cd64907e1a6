import pytest

from vivace.models.load import WEIGHTS

TINY = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


@pytest.fixture(scope="session")
def emoji_folder():
    return WEIGHTS / "emoji" / "transformer"


@pytest.fixture
def tiny_fields():
    """A configuration with learned variance, as a dict to change."""
    return dict(TINY)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A small random network saved by diffusers, with weights large enough that every part matters."""
    import diffusers
    import torch

    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**{name: value for name, value in TINY.items() if name[0] != "_"})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("tiny") / "transformer"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
