"""The contract of every op: each implementation x case x dtype keeps it; an op comes with its cases and its bench."""

import copy
import inspect
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from vivace.kernels import spec as specs
from vivace.kernels.spec import Call, within_tolerance

ROOT = Path(__file__).resolve().parents[2]
REQUIRED_CASES = {"size 1", "size 123", "size 4097", "empty batch", "empty sample"}
ALL = [
    pytest.param(
        op, backend, case, dtype, id=f"{op.name}-{backend}-{case.name}-{dtype}", marks=pytest.mark.backend(backend)
    )
    for op in specs.ops()
    for backend in op.backends
    for case in op.cases()
    for dtype in case.dtypes
]
every_case = pytest.mark.parametrize(("op", "backend", "case", "dtype"), ALL)
every_op = pytest.mark.parametrize("op", specs.ops(), ids=lambda op: op.name)


def public(op):
    return getattr(import_module(f"vivace.kernels.{op.name}"), op.name)


def device_of(backend):
    return "cuda" if backend == "triton" and not specs.interpreted() else "cpu"


def run(op, call, backend):
    """What the call wrote or returned, on the host."""
    result = public(op)(*call.args, **call.kwargs, backend=backend)
    return [tensor.cpu() for tensor in (call.writes or (result if isinstance(result, tuple) else (result,)))]


def before(call):
    return [tensor.cpu().clone() for tensor in call.writes]


def in_float64(call):
    """The same numbers, all in float64."""

    converted = {}

    def convert(value):
        if id(value) in converted:
            return converted[id(value)]
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() and value.itemsize > 1 else value  # 8 bits stay
        if isinstance(value, (list, tuple)):
            return type(value)(convert(item) for item in value)
        if isinstance(value, torch.dtype):
            return torch.float64
        return value.to("cpu", torch.float64) if hasattr(value, "floats") else value

    converted |= {id(tensor): convert(tensor) for tensor in call.writes}
    return Call(
        tuple(map(convert, call.args)),
        {name: convert(value) for name, value in call.kwargs.items()},
        tuple(map(convert, call.writes)),
    )


def same_bits(a, b):
    """Equal bit for bit; NaN equals NaN of the same bits."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@every_case
def test_error_stays_within_the_tolerance_rule(op, backend, case, dtype):
    call = case.make(dtype, device_of(backend))
    unwritten, actual = before(call), run(op, call, backend)
    eager = run(op, case.make(dtype, "cpu"), "reference")
    exact = run(op, in_float64(case.make(dtype, "cpu")), "reference")
    absolute = op.tolerance if case.tolerance is None else case.tolerance
    for a, b, c in zip(actual, eager, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        holds, error, bound = within_tolerance(a, b, c, absolute=absolute)
        assert holds, f"error {error:.3g} exceeds {bound:.3g}"
    for a, b, c, old in zip(actual, eager, exact, unwritten, strict=False):
        untouched = (b == old) & (c.double() == old.double())  # not by chance
        assert torch.equal(a[untouched].double(), old[untouched].double()), "wrote where the definition writes nothing"


@every_case
def test_inputs_are_left_alone_and_a_repeat_has_the_same_bits(op, backend, case, dtype):
    call = case.make(dtype, device_of(backend))
    inputs = [value for value in call.args if isinstance(value, (list, tuple))]
    held = copy.deepcopy(inputs)
    first = run(op, call, backend)
    for value, old in zip(inputs, held, strict=True):
        assert all(same_bits(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(value, old, strict=True))
    for a, b in zip(first, run(op, case.make(dtype, device_of(backend)), backend), strict=True):
        assert same_bits(a, b)


def solver_step_alone(call, b):
    pool, outs, table, rows, index = call.args
    kwargs = {k: v[b : b + 1] if k in ("seeds", "pictures", "adjust", "classes") else v for k, v in call.kwargs.items()}
    args = (pool, [out[b : b + 1] for out in outs], table, rows[b : b + 1], index[b : b + 1])
    return replace(call, args=args, kwargs=kwargs)


def philox_normal_alone(call, b):
    shape, seeds, pictures, draw = call.args
    return replace(call, args=(shape, seeds[b : b + 1], pictures[b : b + 1], draw))


def solver_step_results(call, results, b):
    lane, rank = int(call.args[4][b]), call.args[1][0].dim() - 1
    return [tensor.select(tensor.dim() - rank - 1, lane) for tensor in results]  # [slots, lane, *L] and [lane, *L]


def kept_alone(call, b):
    """Planes stay whole; lanes, weights and rows [R, ...] are those of one row."""
    kept, *args = call.args
    rows = len(call.args[1])

    def one(name, value):
        shared = name == "scales" or not isinstance(value, torch.Tensor) or value.dim() < 2 or len(value) != rows
        return value if shared else value[b : b + 1]

    kwargs = {name: one(name, value) for name, value in call.kwargs.items()}
    own = kwargs.get("out")
    writes = tuple(own if value is call.kwargs.get("out") else value for value in call.writes)
    return replace(call, args=(kept, *(value[b : b + 1] for value in args)), kwargs=kwargs, writes=writes)


def kept_results(call, results, b):
    """Of an update: planes and scales of the row's lane, its sum; of planes applied: its row."""
    lane, written = int(call.args[1][b]), call.writes
    memory = [id(value) for value in (call.args[0], call.kwargs.get("scales"))]
    places = [lane if written and id(written[i]) in memory else b for i in range(len(results))]
    return [result[place] for result, place in zip(results, places, strict=True)]


def philox_normal_results(call, results, b):
    return [results[0][b]]


def sample_adjust_results(call, results, b):
    return [results[0][b]]


def rows_alone(call, b):
    """Ops over rows of hidden states: every tensor [B, ...] less those shared by all samples."""
    batch = call.args[0].shape[0]

    def one(value):
        own = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == batch
        return value[b : b + 1] if own else value

    return replace(call, args=tuple(map(one, call.args)), kwargs={k: one(v) for k, v in call.kwargs.items()})


def rows_results(call, results, b):
    return [tensor[b : b + 1] for tensor in results]


def attention_alone(call, b):
    """Kept keys and values stay whole; those of a call without lanes are one sample's."""
    if "lanes" not in call.kwargs:
        return samples_alone(4)(call, b)
    query, *kept = call.args
    return replace(
        call, args=(query[b : b + 1], *kept), kwargs=call.kwargs | {"lanes": call.kwargs["lanes"][b : b + 1]}
    )


def tokens_alone(call, b):
    """A row with the ids of its picture; what is shared by all rows, and parts that lanes name, stay whole."""
    first, ids, *fresh = call.args
    rows = len(fresh[0]) if fresh else max(len(first), len(ids))
    lanes = call.kwargs.get("lanes")

    def one(value):
        own = isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == rows
        return value[b : b + 1] if own else value

    first = first if lanes is not None else one(first)
    kwargs = {name: one(value) for name, value in call.kwargs.items()}
    kwargs |= {} if lanes is None else {"lanes": lanes[b : b + 1]}
    args = (first, ids[b % len(ids)][None], *map(one, fresh))
    return replace(call, args=args, kwargs=kwargs, writes=(first,) if call.writes else ())


def scatter_results(call, results, b):
    lanes = call.kwargs.get("lanes")
    return [results[0][b if lanes is None else int(lanes[b])]]


def select_alone(call, b):
    planes, weights, ages, keep = call.args
    ages = ages[b : b + 1]
    args = ([plane[b : b + 1] for plane in planes], weights if weights is None else weights[b : b + 1], ages, keep)
    kwargs = {name: value[b : b + 1] if name == "scores" else value for name, value in call.kwargs.items()}
    return replace(call, args=args, kwargs=kwargs, writes=(ages,))


def samples_alone(least):
    """Ops whose tensors of `least` axes or more are [B, ...] where their first axis is as long as the inputs' is."""

    def alone(call, b):
        batch = call.args[0].shape[0]

        def one(value):
            if isinstance(value, tuple):
                return tuple(map(one, value))
            own = isinstance(value, torch.Tensor) and value.dim() >= least and value.shape[0] == batch
            return value[b : b + 1] if own else value

        kwargs = {name: one(value) for name, value in call.kwargs.items()}
        return replace(call, args=one(call.args), kwargs=kwargs, writes=one(call.writes))

    return alone


# Per op: the call of one sample, and one sample of a call's results.
ALONE = {
    "adaln_modulate": (rows_alone, rows_results),
    "attention": (attention_alone, rows_results),
    "cache_apply": (kept_alone, kept_results),
    "cache_update": (kept_alone, kept_results),
    "fp8_linear": (samples_alone(1), rows_results),
    "fp8_quantize_tokens": (samples_alone(1), rows_results),
    "gated_residual": (rows_alone, rows_results),
    "gather_tokens": (tokens_alone, rows_results),
    "gelu": (samples_alone(2), rows_results),
    "linear": (samples_alone(2), rows_results),
    "int8_attention": (samples_alone(4), rows_results),
    "int8_linear": (samples_alone(1), rows_results),
    "int8_norm_modulate": (samples_alone(1), rows_results),
    "norm_modulate": (samples_alone(2), rows_results),
    "qk_norm_rope": (samples_alone(3), rows_results),
    "quantize_tokens": (samples_alone(1), rows_results),
    "scatter_tokens": (tokens_alone, scatter_results),
    "select_tokens": (select_alone, rows_results),
    "solver_step": (solver_step_alone, solver_step_results),
    "philox_normal": (philox_normal_alone, philox_normal_results),
    "sample_adjust": (solver_step_alone, sample_adjust_results),
}


def samples_of(op, call):
    """Samples in a call: its rows, seeds or first axis."""
    counted = {"solver_step": 3, "sample_adjust": 3, "philox_normal": 1, "cache_apply": 1, "cache_update": 1}
    counted |= {"scatter_tokens": 2, "select_tokens": 2}
    count = len(call.args[counted.get(op.name, 0)])
    return max(count, len(call.args[1])) if op.name == "gather_tokens" else count


@every_case
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(op, backend, case, dtype):
    alone, results_of = ALONE[op.name]
    call = case.make(dtype, device_of(backend))
    batch = run(op, call, backend)
    for b in range(samples_of(op, call)):
        single = alone(case.make(dtype, device_of(backend)), b)
        results = results_of(single, run(op, single, backend), 0)
        assert all(map(same_bits, results_of(call, batch, b), results))


@every_op
def test_op_has_the_required_cases_and_unique_names(op):
    names = [case.name for case in op.cases()]
    assert set(names) >= REQUIRED_CASES and len(set(names)) == len(names)


@every_op
def test_op_has_a_bench(op):
    assert (ROOT / "bench" / "kernels" / f"{op.name}.py").is_file()


@every_op
def test_costs_are_positive_where_there_is_work(op):
    for case in op.cases():
        call = case.make(case.dtypes[0], "cpu")
        moved, computed = op.bytes_moved(*call.args, **call.kwargs), op.flops(*call.args, **call.kwargs)
        empty = case.name.startswith("empty")
        assert (moved == 0 and computed == 0) if empty else (moved > 0 and computed >= 0), case.name


@pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(op, backend, id=f"{op.name}-{backend}", marks=pytest.mark.backend(backend))
        for op in specs.ops()
        for backend in op.backends
    ],
)
def test_implementation_takes_the_public_arguments(op, backend):
    wanted = [name for name in inspect.signature(public(op)).parameters if name != "backend"]
    assert list(inspect.signature(specs.load(op, backend)).parameters) == wanted
