"""Blocks reached beneath what others hang on a network: hooks of accelerate and diffusers, compilation."""

import copy
import dataclasses

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from tests.models.pipelines.checks import networks, observes_every_block

from vivace.errors import UnsupportedError


def compute(call):
    return call.compute()


@pytest.fixture
def network():
    """A copy of a tiny network of two streams, free to be changed."""
    first = networks("flux")[0]
    return dataclasses.replace(first, module=copy.deepcopy(first.module))


class Noting(ModelHook):
    """Notes the modules it runs for and doubles what they return."""

    def __init__(self, notes):
        self.notes = notes

    def pre_forward(self, module, *args, **kwargs):
        self.notes.append("before")
        return args, kwargs

    def post_forward(self, module, output):
        self.notes.append("after")
        return (2 * output[0], *output[1:])


def test_hook_of_accelerate_on_the_network_runs_once(network):
    notes = []
    add_hook_to_module(network.module, Noting(notes))
    assert torch.equal(network.intercepted(compute), 2 * network.answer)
    assert notes == ["before", "after"]
    add_hook_to_module(network.module, Noting(notes), append=True)
    assert torch.equal(network.intercepted(compute), 4 * network.answer)
    remove_hook_from_module(network.module)
    observes_every_block(network)


def test_hook_of_accelerate_on_a_block_runs_once(network):
    notes = []
    add_hook_to_module(network.module.transformer_blocks[1], Noting(notes))
    assert torch.equal(network.intercepted(compute), network.run())
    assert notes == ["before", "after"] * 2


def test_weights_offloaded_by_accelerate_come_back_for_each_block(network):
    accelerate.cpu_offload(network.module, torch.device("cpu"), offload_buffers=True)
    assert network.module.proj_out.weight.device.type == "meta"
    assert torch.equal(network.intercepted(compute), network.answer)
    assert network.module.proj_out.weight.device.type == "meta"


def test_model_offload_of_accelerate_goes_through(network):
    accelerate.cpu_offload_with_hook(network.module, torch.device("cpu"))
    assert torch.equal(network.intercepted(compute), network.answer)


def test_group_offload_of_diffusers_goes_through(network):
    cpu = torch.device("cpu")
    network.module.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(network.intercepted(compute), network.answer)


def test_layerwise_casting_of_diffusers_goes_through(network):
    network.module.enable_layerwise_casting(torch.bfloat16, torch.float32)
    assert torch.equal(network.intercepted(compute), network.run())


def test_cache_of_diffusers_on_the_blocks_goes_through(network):
    plain = dataclasses.replace(network, module=copy.deepcopy(network.module))
    for one in (network, plain):
        one.module.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    for _ in range(2):
        with network.module.cache_context("cond"), plain.module.cache_context("cond"):
            assert torch.equal(network.intercepted(compute), plain.run())


class Passing(DiffusersHook):
    def __init__(self):
        super().__init__()
        self.runs = 0

    def pre_forward(self, module, *args, **kwargs):
        self.runs += 1
        return args, kwargs


class Replacing(DiffusersHook):
    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs)


def test_hooks_of_both_libraries_stack(network):
    notes, first, last = [], Passing(), Passing()
    registry = HookRegistry.check_if_exists_or_initialize(network.module)
    registry.register_hook(first, "first")
    add_hook_to_module(network.module, Noting(notes))
    registry.register_hook(last, "last")
    assert torch.equal(network.intercepted(compute), 2 * network.answer)
    assert (first.runs, notes, last.runs) == (1, ["before", "after"], 1)


def test_hook_that_replaces_the_forward_is_refused_by_name(network):
    registry = HookRegistry.check_if_exists_or_initialize(network.module)
    registry.register_hook(Replacing(), "faster")
    with pytest.raises(UnsupportedError, match=r"the diffusers hook 'faster' \(Replacing\) replaces the forward"):
        network.intercepted(compute)


def test_forward_replaced_by_hand_is_refused(network):
    network.module.forward = lambda *args, **kwargs: (network.answer,)
    with pytest.raises(UnsupportedError, match=r"FluxTransformer2DModel.forward was replaced on the object"):
        network.intercepted(compute)


def test_compiled_network_is_refused(network):
    compiled = dataclasses.replace(network, module=torch.compile(network.module, backend="eager"))
    with pytest.raises(UnsupportedError, match="compiled as a whole by torch.compile"):
        compiled.intercepted(compute)
    network.module.compile(backend="eager")
    with pytest.raises(UnsupportedError, match="compiled as a whole by torch.compile"):
        network.intercepted(compute)


def test_compiled_blocks_are_reached(network):
    network.module.transformer_blocks[0].compile(backend="eager")
    network.module.single_transformer_blocks[1] = torch.compile(
        network.module.single_transformer_blocks[1], backend="eager"
    )
    assert torch.equal(network.intercepted(compute), network.run())
