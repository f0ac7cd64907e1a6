"""The bench frame: ratios, intervals, claims and the report's shape. No timing is asserted here."""

import json

import pytest

from vivace import bench
from vivace.bench.harness import Candidate, Claim, Timing, in_turn, interleave, ratio_of_medians, report
from vivace.errors import ArgumentError


def test_ratio_of_medians_is_the_geometric_mean_with_an_interval_around_it():
    slow, fast = Timing((4.0, 4.1, 3.9, 4.0, 9.0)), Timing((1.0, 1.0, 1.1, 0.9, 1.0))
    value, (low, high) = ratio_of_medians([slow, slow], [fast, slow])
    assert value == pytest.approx(2.0)
    assert low <= value <= high


def test_candidates_are_interleaved_and_all_timed():
    order = []
    candidates = {name: Candidate(lambda name=name: order.append(name)) for name in "ab"}
    times = interleave(candidates, seconds=0.0, least=3, warm_up=0.0)
    assert {name: len(timing.ms) for name, timing in times.items()} == {"a": 3, "b": 3}
    assert order[-1] != order[0] or len(set(order)) == 2


def test_long_calls_take_turns_one_timed_call_a_round():
    order, begun = [], []
    candidates = {name: Candidate(lambda name=name: order.append(name), begun.append) for name in "abc"}
    times = in_turn(candidates, seconds=0.0, least=2)
    assert order == [*"abc", *"abc", *"bca"] and begun == [1] * 9
    assert {name: len(timing.ms) for name, timing in times.items()} == {"a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize(("op", "value", "holds"), [(">=", 0.9, True), (">=", 0.7, False), ("<=", 0.9, False)])
def test_a_claim_holds_by_its_own_value(op, value, holds):
    assert Claim("x", op, 0.8, "how", value).holds is holds


def test_a_claim_that_cannot_be_measured_is_null_with_the_reason():
    data = Claim("x", ">=", 1.0, "no GPU").to_dict()
    assert data["value"] is None and data["holds"] is None and data["how"] == "no GPU"


def test_a_report_has_the_promised_fields_and_is_json():
    data = json.loads(json.dumps(report("kernels", [{"op": "a", "ms": 1.0}], [Claim("x", ">=", 1.0, "how", 2.0)])))
    assert list(data) == ["suite", "machine", "versions", "commit", "rows", "claims"]
    assert {"device", "versions", "commit", "date"} <= data["rows"][0].keys()
    assert {"name", "value", "interval", "n", "op", "bound", "holds", "how"} == data["claims"][0].keys()


@pytest.mark.parametrize("wrong", [("everything", {}), ("kernels", {"op": "matmul"}), ("kernels", {"claim": "fast"})])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ArgumentError):
        bench.run(wrong[0], **wrong[1])


def test_every_op_has_a_bench_with_rows_and_claims():
    from importlib import import_module

    from vivace.bench.kernels import OPS
    from vivace.kernels.spec import ops

    assert set(OPS) == {spec.name for spec in ops()}
    for name in OPS:
        module = import_module(f"vivace.bench.kernels.{name}")
        assert callable(module.rows) and isinstance(module.CLAIMS, dict)
