"""Rows by class of token: every element has the bits of the row of its class, whatever the others run."""

import math

import pytest
import torch

from vivace import _C
from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.solver_step import Output, bind_step, build_table, solver_step
from vivace.kernels.solver_step.cases import CLAMP, SWAP, euler_row, guided_row, make, noise_row
from vivace.kernels.solver_step.reference import element_classes
from vivace.kernels.solver_step.table import NET, NONE, OUT

TABLE = (guided_row(), euler_row(), CLAMP, SWAP, noise_row())
BACKENDS = [pytest.param(name, marks=pytest.mark.backend(name)) for name in ("reference", "cpu")]


def call_of(shape, patch, classes, dtype="float32", table=TABLE, **options):
    return make(dtype, "cpu", table=table, shape=shape, branches=2, classes=classes, patch=patch, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((4, 16, 12), (2, 2)),
        ((3, 5, 7), (1, 1)),
        ((2, 6, 9), (6, 9)),
        ((16, 3, 10, 14), (1, 2, 2)),
        ((5, 21), (3,)),
        ((4, 34, 50), (2, 2)),
        ((1, 8, 8), (4, 2)),
    ],
)
def test_each_element_has_the_bits_of_its_classes_row(backend, dtype, shape, patch):
    mixed = call_of(shape, patch, len(TABLE), dtype)
    kwargs = dict(mixed.kwargs)
    classes = element_classes(kwargs.pop("classes"), kwargs.pop("patch"), (1, 1, *shape))
    want = [tensor.clone() for tensor in mixed.writes]
    lanes = mixed.args[4]
    for number in range(len(TABLE)):
        alone = call_of(shape, patch, len(TABLE), dtype)
        bare = {name: value for name, value in alone.kwargs.items() if name not in ("classes", "patch")}
        pool, outs, table, rows, index = alone.args
        solver_step(pool, outs, table, rows + number, index, **bare, backend=backend)
        here = classes == number
        want[0][:, lanes] = torch.where(here, alone.writes[0][:, lanes], want[0][:, lanes])
        want[1][lanes] = torch.where(here, alone.writes[1][lanes], want[1][lanes])
    solver_step(*mixed.args, **mixed.kwargs, backend=backend)
    for got, wanted in zip(mixed.writes, want, strict=True):
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_patches_in_row_major_order_of_a_grid_that_is_not_square(backend):
    pool, table = torch.zeros(1, 1, 2, 4, 6), build_table([[Output(0, [], prev=())], euler_row(1.0)])
    outs = [torch.arange(48.0).view(1, 2, 4, 6)]
    classes = torch.zeros(1, 6, dtype=torch.uint8)
    classes[0, 4] = 1  # second row, second column
    solver_step(pool, outs, table, [0], [0], classes=classes, patch=(2, 2), backend=backend)
    want = torch.zeros(2, 4, 6)
    want[:, 2:4, 2:4] = outs[0][0, :, 2:4, 2:4]
    assert torch.equal(pool[0, 0], want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_row_of_a_class_does_not_write_stays(backend):
    table = build_table(
        [[Output(0, [(OUT, NONE, 1.0)])], [Output(1, [(OUT, NONE, 2.0)]), Output(NET, [], prev=(1.0,))]]
    )
    pool, net = torch.full((2, 1, 1, 1, 4), 7.0), torch.full((1, 1, 1, 4), math.nan)
    classes = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8)
    out = [torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)]
    solver_step(pool, out, table, [0], [0], net=net, classes=classes, patch=(1, 1), backend=backend)
    assert pool.flatten(1).tolist() == [[1.0, 7.0, 7.0, 4.0], [7.0, 4.0, 6.0, 7.0]]
    assert net.flatten()[1:3].tolist() == [4.0, 6.0] and net.flatten()[[0, 3]].isnan().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_pieces_change_no_bit(threads):
    shape = (3, 130, 258)  # several chunks and pieces, none a multiple of a channel
    calls = [call_of(shape, (2, 2), 5) for _ in range(2)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        solver_step(*calls[0].args, **calls[0].kwargs, backend="cpu")
    finally:
        torch.set_num_threads(before)
    solver_step(*calls[1].args, **calls[1].kwargs, backend="reference")
    for one, two in zip(calls[0].writes, calls[1].writes, strict=True):
        assert torch.equal(one.view(torch.int32), two.view(torch.int32))


@pytest.mark.backend("cpu")
def test_a_bound_launch_takes_other_classes_every_time():
    one, two = (call_of((4, 8, 8), (2, 2), 3) for _ in range(2))
    pool, outs, table, rows, index = one.args
    kwargs = dict(one.kwargs) | {"seeds": [1, 2], "pictures": [0, 0]}
    table = table.to()
    launch = bind_step(pool, outs, table, rows.tolist(), index.tolist(), **kwargs)
    assert launch is not None
    for number in range(3):
        classes = (kwargs["classes"] + number) % 3
        launch([number % 2, 1], classes)
        solver_step(
            two.args[0], *two.args[1:3], [number % 2, 1], index, **kwargs | {"net": two.writes[1], "classes": classes}
        )
        launch([0, 0], None)
        bare = {name: value for name, value in kwargs.items() if name not in ("classes", "patch", "net")}
        solver_step(two.args[0], *two.args[1:3], [0, 0], index, **bare, net=two.writes[1])
    assert torch.equal(one.writes[0], two.writes[0]) and torch.equal(one.writes[1], two.writes[1])
    for classes in (kwargs["classes"][:1], kwargs["classes"].int(), kwargs["classes"].repeat(1, 2)[:, ::2]):
        with pytest.raises(ShapeError, match="classes .* needs contiguous uint8"):
            launch([0, 0], classes)
    with pytest.raises(ValueError, match="tokens of class 2 at row 5, but the table has 5 rows"):
        launch([3, 0], torch.full_like(kwargs["classes"], 2))


REFUSED = [
    ({"classes": torch.zeros(2, 4, dtype=torch.int64)}, DtypeError, "classes are int64, needs uint8"),
    ({"classes": torch.zeros(1, 4, dtype=torch.uint8)}, ShapeError, r"classes has shape \(1, 4\), needs \(2, 4\)"),
    ({"classes": torch.zeros(4, 2, dtype=torch.uint8).t()}, ShapeError, "classes are not contiguous"),
    ({"patch": (2,)}, ShapeError, r"patch \(2,\) for samples \(3, 4, 4\)"),
    ({"patch": (2, 3)}, ShapeError, r"patch \(2, 3\) does not divide"),
    ({"patch": (2, 0)}, ShapeError, r"patch \(2, 0\) does not divide"),
    ({"classes": torch.full((2, 4), 2, dtype=torch.uint8)}, ArgumentError, "reach 2, there are 2 rows"),
    ({"outs": []}, ArgumentError, "reach 1 outs, got 0"),
    ({"classes": torch.zeros(2, 4, dtype=torch.uint8, device="meta")}, ArgumentError, "classes is on meta"),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_classes_that_make_no_sense_never_reach_a_kernel(change, error, words):
    legal = {
        "pool": torch.zeros(1, 2, 3, 4, 4),
        "outs": [torch.zeros(2, 3, 4, 4)],
        "table": build_table([[Output(0, [])], euler_row()]).to(),
        "rows": [0, 0],
        "index": [0, 1],
        "classes": torch.ones(2, 4, dtype=torch.uint8),
        "patch": (2, 2),
    }
    solver_step(**legal)
    with pytest.raises(error, match=f"solver_step: .*{words}"):
        solver_step(**legal | change)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize(
    ("sizes", "edges", "words"),
    [
        ((4, 4), (2,), "2 sizes and 1 edges"),
        ((4, 4), (2, 3), "patches of 3 do not divide an axis of 4"),
        ((4, 0), (2, 1), "patches of 1 do not divide an axis of 0"),
        ((4, 4), (2, -2), "patches of -2"),
        ((4, 8), (2, 2), "a sample of 48 is no multiple"),
        ((4, 1 << 62), (2, 2), "more elements than a sample"),
    ],
)
def test_the_extension_checks_sizes_itself(sizes, edges, words):
    pool, classes = torch.zeros(1, 1, 3, 4, 4), torch.zeros(1, 4, dtype=torch.uint8)
    table = build_table([[Output(0, [])]]).to()
    with pytest.raises(ValueError, match=words):
        _C.solver_step(
            pool=pool.data_ptr(), slots=1, capacity=1, numel=48, outs=[], net=0, net_dtype="float32", tensors=[],
            ints=table.ints.data_ptr(), floats=table.floats.data_ptr(), table_rows=1, rows=[0], index=[0],
            seeds=None, pictures=None, threads=1, classes=classes.data_ptr(), sizes=sizes, edges=edges,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_patch_may_span_every_axis_of_a_sample(backend):
    """Latents of a pipeline that are sequences [tokens, width]."""
    pool, table = torch.zeros(1, 1, 4, 3), build_table([[Output(0, [])], euler_row(1.0)])
    out = torch.arange(12.0).view(1, 4, 3)
    classes = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8)
    solver_step(pool, [out], table, [0], [0], classes=classes, patch=(1, 3), backend=backend)
    assert torch.equal(pool[0, 0, 1:3], out[0, 1:3]) and not pool[0, 0, ::3].any()
