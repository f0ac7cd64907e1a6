"""A checkpoint's `diffusion_step_policy` runs: rows in bfloat16 at both ends, in int8 between, as the receipt says."""

from dataclasses import replace

import pytest
import torch

import vivace
from vivace.engine.interchange import apply_step_policy, to_step_policy
from vivace.errors import UnsupportedError
from vivace.models.quantized.given import advised
from vivace.models.quantized.plain import round_layers

POLICY = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "scope": ["transformer"],
    "default_mode": "native",
    "first_steps": {"count": 1, "mode": "a16"},
    "last_steps": {"count": 2, "mode": "a16"},
    "overlap": "a16",
    "reasoner": "a16",
}


@pytest.fixture(scope="module")
def weights():
    return round_layers(vivace.load("emoji"), format="int8")


def policy_plan(pipe):
    plan = vivace.make_plan(pipe.spec.schedule, "ddim", 5, prediction=pipe.spec.prediction)
    return apply_step_policy(plan, {"quant_algo": "INT8", "runtime": {"diffusion_step_policy": POLICY}})


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_the_policy_is_what_runs(weights, backend):
    pipe = vivace.load("emoji", quantized=weights)
    plan = policy_plan(pipe)
    receipt = pipe.compile(plan, backend=backend)("red heart").receipt
    assert [row.precision for row in receipt.rows] == ["bf16", "int8", "int8", "bf16", "bf16"]
    assert receipt.precisions == {"bf16": 3, "int8": 2} and receipt.to_dict()["precisions"] == receipt.precisions
    assert "bf16 in 3 rows, int8 in 2 rows" in str(receipt)
    assert to_step_policy(plan) == POLICY


def test_rows_that_say_nothing_keep_the_bits_of_the_plain_model(weights):
    plain, quantized = vivace.load("emoji"), vivace.load("emoji", quantized=weights)
    plan = vivace.make_plan(plain.spec.schedule, "ddim", 3, prediction=plain.spec.prediction)
    half = vivace.passes.apply_precision(plan, "int8", first=2)
    seen = []
    for pipe, chosen in ((plain, plan), (quantized, half)):
        session = pipe.compile(chosen, backend="cpu")
        state = session.begin(vivace.Request("red heart", seed=1))
        for _ in range(2):
            session.step([state])
        seen.append(state.pool.state[state.entry.lowered.slots["x"], list(state.lanes)].clone())
    assert torch.equal(*seen)


def test_advice_never_takes_more_than_a_quarter_of_a_plan_at_an_end(weights):
    pipe = vivace.load("emoji", quantized=replace(weights, advice={"first": 1, "last": 3, "high": "bf16"}))
    for steps, expected in ((3, {"int8": 3}), (8, {"bf16": 3, "int8": 5})):
        plan = advised(vivace.make_plan(pipe.spec.schedule, "ddim", steps, prediction="v"), pipe.quantized)
        receipt = pipe.compile(plan)("red heart").receipt
        assert receipt.precisions == expected


def test_a_row_of_which_the_weights_hold_nothing_is_refused(weights):
    held = {name: layer for name, layer in weights.layers.items() if name.startswith("blocks.5.")}
    pipe = vivace.load("emoji", quantized=replace(weights, layers=held))
    plan = vivace.make_plan(pipe.spec.schedule, "ddim", 2, prediction="v")
    for backend in ("eager", "cpu"):
        with pytest.raises(vivace.VivaceError, match="hold no linear"):
            pipe.compile(vivace.passes.apply_precision(plan, "int8", blocks=(0, 1)), backend=backend)("red heart")
        pipe.compile(vivace.passes.apply_precision(plan, "int8"), backend=backend)("red heart")


@pytest.mark.parametrize("backend", ["eager", "cpu", "auto"])
def test_a_model_without_weights_refuses_the_row_by_name(backend):
    pipe = vivace.load("emoji")
    with pytest.raises(UnsupportedError, match=r"step 1: .*precision int8.*vivace quantize"):
        pipe.compile(policy_plan(pipe), backend=backend)
