"""The fused solver step: its rows, the golden row, bits, NaN, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from vivace.engine.noise import normals
from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.solver_step import SPEC, Output, StepTable, build_row, build_table, solver_step
from vivace.kernels.solver_step import table as t
from vivace.kernels.solver_step.cases import ALPHA, LAM, SIGMA, UNIPC3, euler_row, guided_row, make, noise_row
from vivace.kernels.solver_step.table import NET, NOISE, NONE, ONE, OUT, TENSOR, Facts

CASES = [pytest.param(c, d, id=f"{c.name}-{d}") for c in SPEC.cases() for d in c.dtypes]
on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
on_fast_backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.impls]
)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def step(rows, pool, backend, outs=(), **arguments):
    """Runs one row on one sample at lane 0 and returns the pool; 1-d tensors stand for samples."""
    device = device_of(backend)
    pool = torch.as_tensor(pool, dtype=torch.float32)[:, None].to(device)
    outs = [torch.as_tensor(out, dtype=torch.float32)[None].to(device) for out in outs]
    solver_step(pool, outs, build_table([rows]), [0], [0], backend=backend, **arguments)
    return pool[:, 0].cpu()


# --- numbers -------------------------------------------------------------------------------------------------------


@on_fast_backends
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_float32_has_the_bits_of_the_reference(backend, case, dtype):
    fast, slow = case.make(dtype, device_of(backend)), case.make(dtype, "cpu")
    solver_step(*fast.args, **fast.kwargs, backend=backend)
    solver_step(*slow.args, **slow.kwargs, backend="reference")
    pool, net = (tensor.cpu() for tensor in fast.writes)
    if fast.args[2].facts.noise and device_of(backend) == "cuda":  # there the normals are within 4e-6 only
        assert torch.allclose(pool, slow.writes[0], rtol=0.0, atol=1e-5)
        return
    assert torch.equal(pool.isnan(), slow.writes[0].isnan())
    assert torch.equal(pool.nan_to_num().view(torch.int32), slow.writes[0].nan_to_num().view(torch.int32))
    if backend == "cpu" or dtype != "bfloat16":  # the interpreter truncates to bfloat16, the compiled kernel rounds
        assert torch.equal(net.view(torch.uint8), slow.writes[1].view(torch.uint8))


def test_golden_row_is_guidance_conversion_and_unipc3_in_one():
    assert LAM == pytest.approx(math.log(ALPHA / SIGMA)) and ALPHA**2 + SIGMA**2 == pytest.approx(1.0)
    assert sum(UNIPC3[1:]) == pytest.approx(0.71000827, abs=2e-8)  # first moment, the same for every row of this step
    call = make("float64", "cpu", table=(guided_row(7.5),), branches=2)
    pool, (cond, uncond), _, _, index = call.args
    x, m1, m2 = (pool[slot, index].clone() for slot in (0, 2, 3))
    solver_step(*call.args, **call.kwargs)
    m0 = (x - SIGMA * (uncond + 7.5 * (cond - uncond))) / ALPHA
    a, b0, b1, b2 = UNIPC3
    wanted = a * x + b0 * m0 + b1 * m1 + b2 * m2
    assert torch.allclose(pool[1, index], m0, rtol=1e-14, atol=1e-14)
    assert torch.allclose(pool[0, index], wanted, rtol=1e-14, atol=1e-13)
    assert torch.allclose(call.writes[1][index], 0.9 * wanted, rtol=1e-14, atol=1e-13)


@on_every_backend
def test_terms_are_summed_in_order_each_rounded(backend):
    big, small = float(np.float32(1e8)), 1.0
    row = [Output(1, [(0, NONE, big), (ONE, NONE, small), (2, NONE, -big)], prev=())]
    assert step(row, [[1.0], [0.0], [1.0]], backend)[1].item() == 0.0  # (1e8 + 1) - 1e8 in float32
    row = [Output(1, [(0, NONE, big), (2, NONE, -big), (ONE, NONE, small)])]
    assert step(row, [[1.0], [0.0], [1.0]], backend)[1].item() == 1.0
    third = float(np.float32(1.0 / 3.0))
    exact = np.float32(np.float32(third * third) + np.float32(-0.11111111))
    row = [Output(1, [(0, NONE, third), (ONE, NONE, float(np.float32(-0.11111111)))])]
    assert step(row, [[third], [0.0]], backend)[1].item() == exact  # a fused multiply-add gives another number


@on_every_backend
def test_noise_is_that_of_the_definition_at_each_sample_picture_and_draw(backend):
    call = make("float32", device_of(backend), table=(noise_row(),), shape=(3, 5))
    call.args[0][3] = 0.0  # the mask: draw 5 adds nothing
    x, out = call.args[0][0].cpu().clone(), call.args[1][0].cpu()
    solver_step(*call.args, **call.kwargs | {"seeds": [11, (1 << 64) - 1], "pictures": [4, 0]}, backend=backend)
    for b, lane, seed, picture in ((0, 2, 11, 4), (1, 0, -1, 0)):
        noise = torch.from_numpy(normals((3, 5), seed, picture=picture, draw=0))
        wanted = 0.8 * x[lane] - 0.2 * out[b] + 0.6 * noise
        assert torch.allclose(call.args[0][0, lane].cpu(), wanted, rtol=0.0, atol=1e-5)


@on_every_backend
def test_nan_and_signed_zero_pass_the_clamp_and_unread_slots_stay_unread(backend):
    nan, inf = math.nan, math.inf
    clamp = [Output(1, [(0, NONE, 1.0)], low=0.0, high=1.0)]
    got = step(clamp, [[nan, -0.0, -2.0, 3.0, inf], [7.0] * 5], backend)[1]
    assert got[0].isnan() and got[1:].tolist() == [0.0, 0.0, 1.0, 1.0] and got[1].signbit()
    unread = [Output(1, [(0, NONE, 1.0), (2, NONE, 0.0), (3, TENSOR, 0.0)], prev=())]
    tensor = torch.full((2,), nan, device=device_of(backend))
    got = step(unread, [[1.0, 2.0], [0.0, 0.0], [nan, inf], [nan, nan]], backend, tensors=[tensor])
    assert got[1].tolist() == [1.0, 2.0]
    scaled = [Output(1, [(0, 2, 1.0)])]  # the scale is read when its source is
    assert step(scaled, [[1.0, 2.0], [0.0, 0.0], [nan, 3.0]], backend)[1, 0].isnan()


@on_every_backend
def test_an_output_may_overwrite_a_source_of_a_later_one(backend):
    rotate = [Output(0, [(1, NONE, 1.0)]), Output(1, [(2, NONE, 1.0)]), Output(2, [(0, NONE, 1.0)])]
    assert step(rotate, [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], backend).tolist() == [[2, 20], [3, 30], [1, 10]]


@on_every_backend
def test_a_row_runs_without_what_only_other_rows_of_its_table_need(backend):
    needy = [Output(NET, [(OUT, TENSOR, 1.0), (NOISE, NONE, 1.0), (200, NONE, 1.0)])]
    pool = torch.ones(2, 1, 3, device=device_of(backend))
    table = build_table([needy, [Output(1, [(0, NONE, 3.0)])]])
    solver_step(pool, [], table, [1], [0], backend=backend)
    assert pool[:, 0].tolist() == [[1.0] * 3, [3.0] * 3]


@on_every_backend
def test_rows_and_lanes_come_as_lists_arrays_or_tensors(backend):
    results = []
    arrays = (np.array([1, 0], np.int32), np.array([0, 2]))
    for rows, index in (([1, 0], [0, 2]), arrays, map(torch.from_numpy, arrays)):
        call = make("float32", device_of(backend), table=(euler_row(), euler_row(3.0)))
        pool, outs, table, _, _ = call.args
        solver_step(pool, outs, table, rows, index, backend=backend)
        results.append(pool.cpu())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# --- rows ----------------------------------------------------------------------------------------------------------


def test_a_row_is_laid_out_as_the_table_says():
    ints, floats = build_row(
        [
            Output(5, [(2, NONE, 0.5), (OUT + 1, TENSOR + 7, -1.0)]),
            Output(NET, [(OUT + 1, TENSOR + 7, 4.0), (NOISE + 3, 6, 2.0)], prev=(0.25,), low=-1.0, high=2.0),
        ]
    )
    assert ints.dtype == np.int32 and ints[:2].tolist() == [3, 2]
    assert ints[2:14].tolist() == [2, OUT + 1, NOISE + 3] + [0] * 9
    assert ints[14:26].tolist() == [NONE, TENSOR + 7, 6] + [NONE] * 9
    assert ints[26:32].tolist() == [5, NET, 0, 0, 0, 0]
    assert floats[0:12].tolist() == [0.5, -1.0] + [0.0] * 10 and floats[12:24].tolist() == [0.0, 4.0, 2.0] + [0.0] * 9
    assert floats[48:64].tolist() == [0.0] * 4 + [0.25] + [0.0] * 11
    assert floats[64:68].tolist() == [-math.inf, -1.0, -math.inf, -math.inf]
    assert floats[68:72].tolist() == [math.inf, 2.0, math.inf, math.inf]


def test_facts_tell_what_the_codes_reach():
    scaled = [Output(4, [(3, 6, 1.0), (NOISE, TENSOR + 2, 1.0)])]
    table = build_table([euler_row(), scaled, [Output(NET, [(OUT + 2, NONE, 1.0)])]])
    kinds = (t.FROM_POOL | t.SCALED_BY_POOL | t.FROM_OUT, t.FROM_OUT | t.FROM_NOISE | t.SCALED_BY_TENSOR)
    reach = [[1, 1, 0, 0, 0, 0, 0], [7, 0, 3, 0, 1, 0, 0], [0, 3, 0, 1, 0, 0, 0]]  # columns of each row
    facts = Facts(kinds, outputs=1, slots=7, branches=3, tensors=3, net=True, adjusted=False, reach=np.array(reach))
    assert table.facts == facts and table.facts.reach.tolist() == reach and table.facts.noise
    assert not build_table([euler_row()]).facts.noise
    assert build_table([[Output(0, [(TENSOR, NONE, 1.0)])]]).facts.kinds == (t.FROM_TENSOR,)


def test_tables_convert_and_concatenate():
    first, second = build_table([euler_row()]), build_table([guided_row(), euler_row(2.0)])
    whole = StepTable.cat([first, second])
    assert len(whole) == 3 and whole.facts == build_table([euler_row(), guided_row(), euler_row(2.0)]).facts
    torches = StepTable.cat([first.to(), second.to()])
    assert torch.equal(torches.ints, torch.from_numpy(whole.ints)) and torches.facts == whole.facts
    assert whole.to(dtype=torch.float64).dtype == "float64" and whole.dtype == "float32"
    assert len(build_table([])) == 0


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ([Output(k, []) for k in range(5)], "5 outputs, at most 4"),
        ([Output(0, [(j, NONE, 1.0) for j in range(13)])], "output 0 brings source 13, at most 12"),
        ([Output(0, [(1, NONE, 1.0), (1, NONE, 2.0)])], "mentions a source twice"),
        ([Output(0, []), Output(0, [])], "two outputs have one destination"),
        ([Output(NONE, [])], "unknown destination code -1"),
        ([Output(ONE, [])], "unknown destination code 512"),
        ([Output(0, [(NET, NONE, 1.0)])], r"unknown source or scale code \(768, -1\)"),
        ([Output(0, [(0, ONE, 1.0)])], r"unknown source or scale code \(0, 512\)"),
        ([Output(0, [(0, NONE, math.nan)])], "not finite"),
        ([Output(0, [], prev=(1.0,))], "1 numbers in `prev`, 0 outputs precede"),
        ([Output(0, [], low=1.0, high=0.0)], "low must not exceed high"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(outputs, words):
    with pytest.raises(ArgumentError, match=words):
        build_row(outputs)


def test_tables_that_make_no_sense_are_refused():
    table = build_table([euler_row()])
    with pytest.raises(ShapeError, match=r"floats has shape \(1, 71\), needs \[rows, 72\]"):
        StepTable(table.ints, table.floats[:, :71])
    with pytest.raises(ShapeError, match="1 rows, floats 0"):
        StepTable(table.ints, table.floats[:0])
    with pytest.raises(DtypeError, match="ints is int64, needs int32"):
        StepTable(table.ints.astype(np.int64), table.floats)
    with pytest.raises(ArgumentError, match="row 0 has the unknown source code 300"):
        ints = table.ints.copy()
        ints[0, 2] = 300
        StepTable(ints, table.floats)
    with pytest.raises(ArgumentError, match="facts"):
        StepTable(torch.zeros(1, 32, dtype=torch.int32, device="meta"), torch.zeros(1, 72, device="meta"))
    with pytest.raises(DtypeError, match="numpy float32, torch float32"):
        StepTable.cat([table, table.to()])
    with pytest.raises(ArgumentError, match="overflows float32"):
        build_table([euler_row(1e300)])


# --- arguments -----------------------------------------------------------------------------------------------------


def arguments(**changes):
    """A legal call of a row that reads two branches, a tensor and noise and writes the network input; one change."""
    row = [Output(0, [(3, NONE, 1.0), (OUT + 1, TENSOR, 1.0), (NOISE, NONE, 1.0)]), Output(NET, [], prev=(1.0,))]
    legal = {
        "pool": torch.zeros(4, 3, 5), "outs": [torch.zeros(2, 5)] * 2, "table": build_table([row]).to(),
        "rows": [0, 0], "index": [2, 0], "net": torch.zeros(3, 5), "tensors": [torch.zeros(5)],
        "seeds": [1, 2], "pictures": [0, 0],
    }  # fmt: skip
    return legal | changes


REFUSED = [
    ({"pool": torch.zeros(4, 3, 5).half()}, DtypeError, "pool is float16"),
    ({"pool": torch.zeros(4, 3)}, ShapeError, r"pool has shape \(4, 3\)"),
    ({"pool": torch.zeros(5, 3, 4).transpose(0, 2)}, ShapeError, "pool is not contiguous"),
    ({"pool": torch.zeros(3, 3, 5)}, ArgumentError, "reach 4 pool slots, got 3"),
    ({"outs": [torch.zeros(2, 5)]}, ArgumentError, "reach 2 outs, got 1"),
    ({"outs": [torch.zeros(2, 5), torch.zeros(2, 4)]}, ShapeError, r"outs\[1\] has shape \(2, 4\), needs \(2, 5\)"),
    ({"outs": [torch.zeros(2, 5).double()] * 2}, DtypeError, r"outs\[0\] is float64"),
    ({"outs": [torch.zeros(2, 5, device="meta")] * 2}, ArgumentError, r"outs\[0\] is on meta"),
    ({"table": build_table([euler_row()], np.float64).to()}, DtypeError, "table is float64, pool float32"),
    ({"table": build_table([euler_row()]).to("meta")}, ArgumentError, "table is on meta"),
    ({"rows": [0, 1]}, ArgumentError, "rows reach from 0 to 1, there are 1"),
    ({"rows": [0]}, ShapeError, "index has 2 entries, rows 1"),
    ({"rows": torch.zeros(2)}, DtypeError, "rows is float32"),
    ({"index": [3, 0]}, ArgumentError, "index reach from 0 to 3, there are 3 lanes"),
    ({"index": [-1, 0]}, ArgumentError, "from -1 to 0"),
    ({"index": [1, 1]}, ArgumentError, "names a lane twice"),
    ({"net": None}, ArgumentError, "net is None"),
    ({"net": torch.zeros(2, 5)}, ShapeError, r"net has shape \(2, 5\), needs \(3, 5\)"),
    ({"net": torch.zeros(3, 5).int()}, DtypeError, "net is int32"),
    ({"net": torch.zeros(5, 3).t()}, ShapeError, "net is not contiguous"),
    ({"tensors": []}, ArgumentError, "reach 1 tensors, got 0"),
    ({"tensors": [torch.zeros(5).half()]}, DtypeError, r"tensors\[0\] is float16"),
    ({"tensors": [torch.zeros(4)]}, ShapeError, r"tensors\[0\] has shape \(4,\)"),
    ({"tensors": [torch.zeros(10)[::2]]}, ShapeError, r"tensors\[0\] is not contiguous"),
    ({"seeds": None}, ArgumentError, "a row reads noise"),
    ({"pictures": [0]}, ShapeError, "pictures has 1 entries, rows 2"),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_arguments_never_reach_a_kernel(change, error, words):
    solver_step(**arguments())
    call = arguments(**change)
    held = call["pool"].clone()
    with pytest.raises(error, match=f"solver_step: .*{words}"):
        solver_step(**call)
    assert torch.equal(call["pool"], held)
