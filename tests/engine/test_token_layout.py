"""Where image tokens lie in latents: channels first, frames before channels, one token a row."""

import pytest
import torch

from vivace.engine.token_layout import Layout
from vivace.kernels.solver_step.reference import element_classes

LAYOUTS = {
    "picture": Layout((3, 4, 6), (3, 2, 2)),
    "video": Layout((3, 2, 4, 6), (3, 1, 2, 2)),
    "frames": Layout((4, 3, 2, 6), (2, 3, 1, 2), 1),
    "packed": Layout((6, 12), (1, 12), 1, 4),
}
EDGES = {"picture": (2, 2), "video": (1, 2, 2), "frames": (2, 1, 2), "packed": (1, 4)}
GRIDS = {"picture": (2, 3), "video": (2, 2, 3), "frames": (2, 2, 3), "packed": (6, 1)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_are_counted_along_the_axes_behind_channels(name):
    layout = LAYOUTS[name]
    latents = torch.arange(2 * torch.Size(layout.shape).numel()).view(2, *layout.shape)
    planes = layout.planes(latents)
    assert layout.patch == EDGES[name] and layout.grid == GRIDS[name]
    assert planes.shape[1] == 3
    assert planes.shape[2:] == tuple(g * e for g, e in zip(layout.grid, layout.patch, strict=True))
    assert planes.data_ptr() == latents.data_ptr()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_value_of_each_token_is_that_of_its_elements(name):
    layout = LAYOUTS[name]
    tokens = torch.arange(2 * layout.tokens).view(2, -1)
    found = layout.pixels(tokens).expand(2, *layout.shape)
    by_place = layout.planes(found)
    wanted = Layout((3, *by_place.shape[2:]), (3, *layout.patch)).pixels(tokens).expand(by_place.shape)
    assert torch.equal(by_place, wanted)
    count = torch.Size(layout.shape).numel() // layout.tokens
    assert torch.equal(found.flatten(1).sort(dim=1).values, tokens.repeat_interleave(count, 1))


@pytest.mark.parametrize("name", LAYOUTS)
def test_solvers_take_the_same_elements(name):
    layout = LAYOUTS[name]
    classes = torch.randint(4, (2, layout.tokens), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = element_classes(classes, layout.by_element, (5, 2, *layout.shape)).expand(2, *layout.shape)
    assert torch.equal(found, layout.pixels(classes).expand(2, *layout.shape))


def test_a_token_of_a_packed_latent_holds_pixels_behind_each_channel():
    layout = LAYOUTS["packed"]
    latents = torch.arange(72.0).view(1, 6, 12)
    planes = layout.planes(latents)
    assert torch.equal(planes[0, 1, 2], latents[0, 2, 4:8])
