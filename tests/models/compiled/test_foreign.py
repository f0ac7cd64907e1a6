"""Networks of diffusers compiled for the CPU: a DiT as the native one, others with packed linears inside."""

import pytest
import torch
from tests.models.pipelines.test_denoiser import built, load, plan_of, prompt_of

import vivace
from vivace.kernels.spec import error_of
from vivace.models.compiled.foreign import native_of
from vivace.models.pipelines.fused import fuse


@pytest.fixture(scope="module", params=["dit", "sd3", "sd15"])
def sessions(request):
    """(name, plan's eager session, its compiled one) of a family."""
    pipe = load(request.param)
    plan = plan_of(request.param, pipe)
    return request.param, *(pipe.compile(plan, backend=backend) for backend in ("eager", "cpu"))


def test_compiled_pictures_are_those_of_the_eager_executor(sessions):
    name, eager, compiled = sessions
    plain, ours = (session(prompt_of(name), n=2, seed=3).latents for session in (eager, compiled))
    assert error_of(ours, plain) < 1e-5


def test_a_picture_has_the_same_bits_alone_and_in_a_batch(sessions):
    name, _, compiled = sessions
    both = compiled(prompt_of(name), n=2, seed=3)
    assert torch.equal(both.latents[1:], compiled(prompt_of(name), index=1, seed=3).latents)


def test_the_receipt_says_what_runs_the_network(sessions):
    name, _, compiled = sessions
    receipt = compiled(prompt_of(name)).receipt
    (use,) = [use for use in receipt.kernels if use.op == "network"]
    if name == "dit":
        assert use.reason.startswith(("C++ row", "torch sequence")) and receipt.hoisted["modulation"] > 0
    else:
        assert "packed linears" in use.reason and receipt.hoisted == {}
        assert receipt.compiled["main"]["replaced"]["linear"]["places"] > 5
    assert receipt.executor == "cpu" and receipt.compiles > 0


def test_auto_compiles_where_it_can_and_says_why_not_elsewhere():
    pipe = load("dit")
    assert pipe.compile(plan_of("dit", pipe)).executor.name == "cpu"
    session = pipe.compile(plan_of("dit", pipe), dtype="float64")
    assert session.executor.name == "eager" and "the model is float64" in session.executor.reason
    with pytest.raises(vivace.BackendError, match="the model is float64"):
        pipe.compile(plan_of("dit", pipe), dtype="float64", backend="cpu")


def test_a_dit_with_a_changed_piece_is_not_taken_for_the_native_one():
    plain = built("dit")
    pipe = load("dit", plain)
    assert native_of(pipe.compile(plan_of("dit", pipe), backend="eager").denoiser) is not None
    handle = plain.transformer.transformer_blocks[0].register_forward_hook(lambda *_: None)
    session = pipe.compile(plan_of("dit", pipe), backend="cpu")
    handle.remove()
    assert "packed linears" in session(prompt_of("dit")).receipt.kernels[-1].reason


def test_a_packed_linear_layer_agrees_with_its_original_and_takes_it_where_it_must():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(48, 70), torch.nn.Linear(70, 5).half()).eval()
    stand_in, report = fuse(network, pack=True)
    x = torch.randn(5, 48)
    with torch.no_grad():
        packed, exact = stand_in[0](x), torch.nn.functional.linear(*(t.double() for t in (x, *network[0].parameters())))
    assert error_of(packed, exact) < 1e-6
    assert report.places("linear") == 1 and [left.reason for left in report.left] == ["weights in float16"]
    stand_in[0](x.requires_grad_()).sum().backward()  # gradients take the original
    assert x.grad is not None


def test_linear_layers_are_packed_only_when_asked():
    network = torch.nn.Sequential(torch.nn.Linear(48, 64)).eval()
    assert fuse(network)[0] is network and fuse(network, pack=True)[0] is not network
