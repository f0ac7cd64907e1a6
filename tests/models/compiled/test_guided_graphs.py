"""Guidance that is decided at run time, estimated or perturbed, through the executor of graphs."""

import pytest
import torch
from tests.models.compiled.test_graph_sessions import session

import vivace
from vivace.engine.passes import (
    apply_adaptive_guidance,
    apply_guidance,
    apply_linear_ag,
    apply_perturbed_attention,
)
from vivace.models.class_denoiser import ClassDenoiser
from vivace.models.compiled.replay import DitReplay
from vivace.models.load import load as load_model


@pytest.fixture(scope="module")
def native():
    return ClassDenoiser(load_model("emoji"))


def plans(spec):
    guided = apply_guidance(vivace.make_plan(spec.schedule, "unipc", 6, prediction=spec.prediction), 2.0)
    yield apply_adaptive_guidance(guided, 0.8), 12
    yield apply_linear_ag(guided, rows=[2, 4]), 10
    yield apply_perturbed_attention(guided, 1.0, blocks=(2, 4)), 18


@pytest.mark.parametrize("which", range(3), ids=("adaptive", "linear", "perturbed"))
def test_graphs_give_what_eager_gives(native, which):
    plan, planned = list(plans(native.spec))[which]
    replay = DitReplay(native.model.module, lambda match, b: native.model.classes if b == "uncond" else match.id)
    results = []
    for graphs in (True, False):
        made = session(native, replay, plan, graphs=graphs)
        results.append(made("pizza", n=2, seed=5))
    one, two = results
    assert torch.allclose(one.latents, two.latents, atol=2e-4)
    assert one.receipt.branch_evals == two.receipt.branch_evals <= one.receipt.branch_evals_planned == planned
    assert [decision.fired for decision in one.receipt.decisions] == [
        decision.fired for decision in two.receipt.decisions
    ]
    if which == 0:
        assert one.receipt.guidance["removed"] > 0
    reasons = " ".join(use.reason for use in one.receipt.kernels)
    assert ("identity" in reasons) == (which == 2) and "captured" in reasons
