"""One table, family x check; then networks of no known family."""

import dataclasses

import diffusers
import pytest
import torch
from tests.models.pipelines import report
from tests.models.pipelines.checks import CHECKS, ON_NETWORKS, Network, networks
from tests.models.pipelines.tiny import FAMILIES, VARIANTS

from vivace.errors import ArgumentError, ModelError, UnsupportedError
from vivace.models.pipelines import families
from vivace.models.pipelines.blocks import ModuleParts


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, check):
    CHECKS[check].run(name)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_of_a_pipeline_shows_the_same_blocks(name):
    CHECKS["blocks_observed"].run(name)


class OwnBlock(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, tokens, caption, temb):
        return caption + temb, tokens + self.linear(tokens) * caption.mean()


class OwnTransformer(torch.nn.Module):
    """A small network with two streams, as a user may bring."""

    def __init__(self):
        super().__init__()
        self.config = diffusers.configuration_utils.FrozenDict(in_channels=4, num_layers=2)
        self.layers = torch.nn.ModuleList(OwnBlock(4) for _ in range(2))

    def forward(self, tokens, caption, temb=1.0):
        for layer in self.layers:
            caption, tokens = layer(tokens, caption, temb)
        return (tokens,)


@pytest.fixture
def own():
    """A network of a family of its own, with arguments and answer; the table is as before afterwards."""
    torch.manual_seed(0)
    module, args = OwnTransformer(), (torch.randn(1, 6, 4), torch.randn(1, 3, 4))
    before = dict(families.FAMILIES)
    yield Network(module, args, {}, module(*args)[0].detach())
    families.FAMILIES.clear()
    families.FAMILIES.update(before)


RECORD = families.Family(
    denoiser="OwnTransformer",
    blocks=(families.Blocks("layers", families.Shape("tokens", "caption", returns=("context", "hidden"))),),
    latent=lambda config: (config.in_channels, 2, 3),
    patch=lambda config: (1, 1),
    layout="tokens",
)


def test_own_family_passes_the_checks(own):
    families.register_family(RECORD)
    for holds in ON_NETWORKS.values():
        holds(own)


def test_unknown_network_is_told_the_lines_to_add(own):
    with pytest.raises(UnsupportedError, match="OwnTransformer is of no known family") as caught:
        families.family_of(own.module)
    draft = str(caught.value).partition("\n\n")[2]
    assert (
        "Blocks('layers', Shape(hidden='tokens', context=None, returns=('hidden',))),  # 2 x OwnBlock(tokens," in draft
    )
    assert len(draft.splitlines()) <= 30
    exec(draft, {})
    assert families.family_of(own.module).denoiser == "OwnTransformer"


def test_lines_to_add_are_short_for_blocks_that_diffusers_registers():
    network = networks("flux")[0].module
    unknown = type("Unknown", (torch.nn.Module,), {})()
    unknown.joint, unknown.single = network.transformer_blocks, network.single_transformer_blocks
    with pytest.raises(UnsupportedError, match=r"Blocks\('joint'\),  # 2 x FluxTransformerBlock\(hidden_states, enc"):
        families.family_of(unknown)


def test_network_without_lists_is_told_so():
    with pytest.raises(UnsupportedError, match="no list of modules found"):
        families.family_of(torch.nn.Linear(2, 2))


def test_family_is_not_replaced_by_accident(own):
    families.register_family(RECORD)
    with pytest.raises(ArgumentError, match="known already"):
        families.register_family(RECORD)
    families.register_family(dataclasses.replace(RECORD, prediction="v"), replace=True)
    assert families.family_of(own.module).prediction == "v"


def test_network_without_the_blocks_of_its_record_is_refused(own):
    families.register_family(dataclasses.replace(RECORD, blocks=(families.Blocks("stages"),)))
    with pytest.raises(ModelError, match="no block under stages"):
        ModuleParts(own.module)


def test_blocks_that_diffusers_does_not_register_need_a_shape(own):
    families.register_family(dataclasses.replace(RECORD, blocks=(families.Blocks("layers"),)))
    with pytest.raises(UnsupportedError, match="registers no streams for OwnBlock"):
        ModuleParts(own.module)


def test_shape_that_does_not_fit_the_block_is_refused(own):
    families.register_family(dataclasses.replace(RECORD, blocks=(families.Blocks("layers", families.CROSS),)))
    with pytest.raises(UnsupportedError, match="no argument 'hidden_states', it has tokens, caption, temb"):
        ModuleParts(own.module)


def test_subclass_is_of_the_family_it_inherits_from():
    mine = type("Mine", (diffusers.SD3Transformer2DModel,), {})
    assert families.family_of(mine(num_layers=1, num_attention_heads=1)).denoiser == "SD3Transformer2DModel"


def test_captions_of_different_lengths_are_refused_where_they_matter():
    network = networks("lumina2")[0]
    kwargs = {key: torch.cat([value] * 2) for key, value in network.kwargs.items() if isinstance(value, torch.Tensor)}
    kwargs["encoder_attention_mask"][1, 3:] = 0
    uneven = dataclasses.replace(network, kwargs={**network.kwargs, **kwargs})
    with pytest.raises(UnsupportedError, match=r"captions of \[3, 6\] tokens"):
        uneven.intercepted(lambda call: call.compute())


def test_committed_table_is_what_the_checks_give():
    assert report.PATH.read_text() == report.render()
