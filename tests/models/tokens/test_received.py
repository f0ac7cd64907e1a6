"""What attention tokens of the native DiT receive, told by full rows to those that compute some tokens."""

import pytest
import torch
import torch.nn.functional as F

import vivace
from vivace.engine.request import Request

SCHEDULE = {"selector": "attention", "first": 2, "every": 4}


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


def planned(pipe, steps=7):
    spec = pipe.spec
    plan = vivace.make_plan(spec.schedule, solver="ddim", steps=steps, prediction=spec.prediction)
    return vivace.passes.apply_tokens(vivace.passes.apply_guidance(plan, 3.0), 0.5, **SCHEDULE)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_kept_is_the_weight_that_the_last_block_gives_to_each_token(pipe, monkeypatch, backend):
    session = pipe.compile(planned(pipe), backend=backend)
    state = session.begin(Request("red heart", n=2, seed=3))
    session.step([state])
    seen = []
    attention = F.scaled_dot_product_attention

    def watched(query, key, value):
        seen.append((query.double(), key.double()))
        return attention(query, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watched)
        session.step([state])
    query, key = seen[-1]  # rows [branch][picture]: cond first
    weights = torch.softmax(query @ key.transpose(2, 3) / key.shape[3] ** 0.5, dim=3)
    wanted = weights.sum(dim=2).mean(dim=1)[:2]
    found = state.tokens.scores(2)
    assert found.shape == wanted.shape
    count = wanted.shape[1]
    assert float((found.double() - wanted).abs().max()) <= 64 * 2.0**-24 * count
    assert found.sum(dim=1).tolist() == pytest.approx([count, count])
    chosen = found.argsort(dim=1, stable=True)[:, count // 2 :].sort(dim=1).values
    session.step([state])
    assert torch.equal(state.tokens.ids.long(), chosen)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_every_picture_listens_for_itself(pipe, backend):
    session = pipe.compile(planned(pipe), backend=backend)
    both = session("red heart", n=2, seed=3)
    assert torch.equal(session("red heart", index=1, seed=3).latents, both.latents[1:])
    told = [use.reason for use in both.receipt.kernels if use.backend == "torch"]
    assert (backend == "eager") or any("received" in reason for reason in told)
    assert session.kept.idle
