"""`solver_step`: the guided UniPC-3 row against copies of equal traffic, torch, torch.compile and diffusers.

Floor: the bytes of the row at copy bandwidth, the best of memcpy and a non-temporal copy, measured in the same rounds
with the same threads. In cache that share means nothing (it exceeds 100 %), so it is given above four times the
last-level cache only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vivace.bench import device
from vivace.bench.compiling import compiled_peer
from vivace.bench.harness import Candidate, Claim, Timing, interleave, ratio_of_medians
from vivace.errors import BackendError
from vivace.kernels.solver_step import SPEC, Output, StepTable, build_table, solver_step
from vivace.kernels.solver_step.cost import bytes_moved
from vivace.kernels.solver_step.table import NONE, OUT
from vivace.kernels.spec import UNIT_ROUNDOFF, missing

SEED = 7
SHAPES = {"DiT-XL/2": (4, 32, 32), "SDXL": (4, 128, 128), "SD3": (16, 128, 128), "FLUX.1": (4096, 64)}
BATCHES = (1, 8)
DTYPES = ("float32", "bfloat16")  # of the network's outputs; the state is float32
PEER_SHAPES = ((8, 4, 128, 128), (4, 16, 128, 128))

# A row of the size and shape of guided UniPC-3 in x0 form, with plausible numbers that keep the state bounded however
# often it is repeated: m0 <- x0(x, g = uncond + 4 (cond - uncond)); x <- corrector and predictor merged. The newest
# prediction takes the slot of the oldest.
X, M1, M2, M3 = 0, 1, 2, 3
X0 = {X: 1.02, OUT: -0.8, OUT + 1: 0.6}
STEP = {X: 0.55, M1: -0.2, M2: 0.08, M3: -0.02}
STEP_M0 = 0.25


@dataclass(frozen=True, eq=False)
class Problem:
    """One call: slots x, m1, m2, m3 of every sample, both branches, the row."""

    pool: Tensor
    outs: tuple[Tensor, Tensor]
    table: StepTable
    rows: Tensor
    index: Tensor

    @staticmethod
    def of(shape: tuple[int, ...], dtype: str = "float32") -> Problem:
        """shape [B, *L]; memory is written, so no page is missing later."""
        generator = torch.Generator().manual_seed(SEED)
        pool = torch.randn(4, *shape, generator=generator)
        cond, uncond = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
        batch = shape[0]
        return Problem(pool, (cond, uncond), unipc3_table(), torch.zeros(batch, dtype=torch.int64), torch.arange(batch))

    @property
    def bytes(self) -> int:
        return bytes_moved(self.pool, self.outs, self.table, self.rows, self.index)

    def run(self, backend: str) -> None:
        solver_step(self.pool, self.outs, self.table, self.rows, self.index, backend=backend)

    def copy(self) -> Problem:
        return Problem(self.pool.clone(), self.outs, self.table, self.rows, self.index)

    def on(self, place: str) -> Problem:
        """The same on a device."""
        cond, uncond = (out.to(place) for out in self.outs)
        return Problem(
            self.pool.to(place), (cond, uncond), self.table.to(place), self.rows.to(place), self.index.to(place)
        )


@cache
def unipc3_table() -> StepTable:
    """The row above as a table of one row, torch float32."""
    first = Output(M3, [(code, NONE, number) for code, number in X0.items()])
    second = Output(X, [(code, NONE, number) for code, number in STEP.items()], prev=(STEP_M0,))
    return build_table([(first, second)]).to("cpu", torch.float32)


def eager_step(problem: Problem, m0: Tensor) -> None:
    """The row in torch ops, in place as far as they go: eight passes; the newest prediction goes to `m0`."""
    (cond, uncond), (x, m1, m2, m3) = problem.outs, problem.pool
    torch.mul(x, X0[X], out=m0).add_(cond, alpha=X0[OUT]).add_(uncond, alpha=X0[OUT + 1])
    x.mul_(STEP[X]).add_(m1, alpha=STEP[M1]).add_(m2, alpha=STEP[M2]).add_(m3, alpha=STEP[M3]).add_(m0, alpha=STEP_M0)


def plain_step(x: Tensor, cond: Tensor, uncond: Tensor, m1: Tensor, m2: Tensor, m3: Tensor) -> None:
    """The row as one expression for torch.compile, which fuses it."""
    m0 = X0[X] * x + X0[OUT] * cond + X0[OUT + 1] * uncond
    after = STEP[X] * x + STEP[M1] * m1 + STEP[M2] * m2 + STEP[M3] * m3 + STEP_M0 * m0
    x.copy_(after)
    m3.copy_(m0)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models; on the GPU where there is one."""
    if not device.present():
        require_extension()
    found = []
    shapes = {"SDXL": SHAPES["SDXL"]} if quick else SHAPES
    for name, latent in shapes.items():
        for batch in BATCHES:
            for dtype in DTYPES:
                found += case_rows(f"unipc3 guided, {name} x{batch}", (batch, *latent), dtype, quick)
    return found


def case_rows(case: str, shape: tuple[int, ...], dtype: str, quick: bool) -> list[dict[str, Any]]:
    """One row a backend, checked first, timed together."""
    problem = Problem.of(shape, dtype)
    if device.present():
        return device_rows(case, problem.on(device.PLACE), dtype, quick)
    check(problem)
    candidates = {"cpu": Candidate(lambda: problem.run("cpu")), **copies(problem.bytes)}
    reference, eager = problem.copy(), problem.copy()
    candidates["reference"] = Candidate(lambda: reference.run("reference"))
    spare = torch.zeros_like(eager.pool[0])
    candidates["eager"] = Candidate(lambda: eager_step(eager, spare))
    compiled, reason = (None, "not compiled in a quick run") if quick else compiled_step(problem.copy())
    if compiled is not None:
        candidates["torch.compile"] = Candidate(compiled)
    times = interleave(candidates, seconds=0.5 if quick else 2.0)
    extra = {"over_compile_reason": reason}
    return [
        describe(name, case, shape, dtype, problem.bytes, times) | extra
        for name in ("cpu", "reference", "eager", "torch.compile")
        if name in times
    ]


def device_rows(case: str, problem: Problem, dtype: str, quick: bool) -> list[dict[str, Any]]:
    """The same on the GPU."""
    backend = device.backend(SPEC)
    check(problem, backend)
    inputs = (problem.pool[X], *problem.outs, *problem.pool[M1:])
    work = device.Work(
        "solver_step", case, backend, lambda: problem.run(backend), plain_step, inputs,
        tuple(problem.pool.shape[1:]), dtype, problem.bytes,
    )  # fmt: skip
    return device.rows(work, quick)


def describe(
    backend: str, case: str, shape: tuple[int, ...], dtype: str, traffic: int, times: dict[str, Timing]
) -> dict[str, Any]:
    """One row of the report; ratios above 1 mean faster than the peer."""
    from vivace import _C

    ms = times[backend].median
    floor = min(times[name].median for name in ("memcpy", "copy_stream"))
    in_memory = traffic >= 4 * _C.last_level_cache_bytes()

    def over(peer: str) -> float | None:
        return times[peer].median / ms if peer in times else None

    return {
        "op": "solver_step", "backend": backend, "case": case, "shape": list(shape), "dtype": dtype,
        "ms": times[backend].to_dict(), "gb_per_s": traffic / ms / 1e6, "bytes": traffic,
        "roofline_gb_per_s": traffic / floor / 1e6, "percent_of_roofline": 100 * floor / ms if in_memory else None,
        "over_eager": over("eager"), "over_compile": over("torch.compile"),
        "threads": torch.get_num_threads(), "seed": SEED,
    }  # fmt: skip


def check(problem: Problem, backend: str = "cpu") -> None:
    """The kernel gives the reference's bits and the eager peer its numbers; raises BackendError otherwise.

    On a GPU the reference fuses products and sums as torch does there, so its numbers are compared.
    """
    exact, kernel, eager = problem.copy(), problem.copy(), problem.copy()
    exact.run("reference")
    kernel.run(backend)
    same = torch.equal(exact.pool, kernel.pool) if backend == "cpu" else near(exact.pool, kernel.pool)
    if not same:
        raise BackendError(f"bench solver_step: {backend} differs from the reference; nothing was timed")
    m0 = torch.zeros_like(eager.pool[0])
    eager_step(eager, m0)
    if not near(exact.pool[X], eager.pool[X]) or not near(exact.pool[M3], m0):
        raise BackendError("bench solver_step: the eager peer computes something else; nothing was timed")


def near(ours: Tensor, theirs: Tensor) -> bool:
    """Within some roundings of float32."""
    return bool((ours - theirs).abs().max() <= 16 * UNIT_ROUNDOFF["float32"] * ours.abs().max())


def require_extension() -> None:
    """Benches of kernels need the extension. Raises BackendError."""
    if (reason := missing("cpu")) is not None:
        raise BackendError(f"bench solver_step: {reason}")


def copies(traffic: int) -> dict[str, Candidate]:
    """Copies that read and write `traffic` bytes in all, on the threads that the kernel uses."""
    from vivace import _C

    source, target = (torch.ones(traffic // 2, dtype=torch.uint8) for _ in range(2))

    def candidate(copy: Callable[[int, int, int, int], None]) -> Candidate:
        return Candidate(lambda: copy(target.data_ptr(), source.data_ptr(), len(source), torch.get_num_threads()))

    return {"memcpy": candidate(_C.copy_memcpy), "copy_stream": candidate(_C.copy_stream)}


def compiled_step(problem: Problem) -> tuple[Callable[[], None] | None, str | None]:
    """`plain_step` compiled for these tensors, or None and why not."""
    return compiled_peer(plain_step, (problem.pool[X], *problem.outs, *problem.pool[M1:]))


def bandwidth_fraction(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Bandwidth of the guided UniPC-3 row over that of the best copy of equal traffic; both from memory."""
    from vivace import _C

    require_extension()
    traffic = max(256 << 20, 4 * _C.last_level_cache_bytes())
    shape = (2, 4, traffic // (8 * 4) // (8 * 1024), 1024)
    found, times = [], {}
    for case, size in (("unipc3 guided, from memory", shape), ("unipc3 guided, in cache", (1, 4, 64, 64))):
        problem = Problem.of(size)
        check(problem)
        candidates = {"cpu": Candidate(problem_call(problem)), **copies(problem.bytes)}
        times[case] = interleave(candidates, seconds=5 if quick else 15, least=11)
        found.append(describe("cpu", case, size, "float32", problem.bytes, times[case]))
    memory, cached = times.values()
    best = min(("memcpy", "copy_stream"), key=lambda name: memory[name].median)
    value, interval = ratio_of_medians([memory[best]], [memory["cpu"]], SEED)
    how = (
        f"{found[0]['bytes'] >> 20} MiB of traffic, float32, {torch.get_num_threads()} threads, best copy: {best} at "
        f"{found[0]['roofline_gb_per_s']:.1f} GB/s; medians of interleaved rounds; 0.5 MiB in cache takes "
        f"{cached['cpu'].median * 1e3:.1f} us, call included"
    )
    name = "kernels.solver_step.bandwidth_fraction"
    return found, Claim(name, ">=", 0.8, how, value, (interval[0], interval[1]), len(memory["cpu"].ms))


def problem_call(problem: Problem) -> Callable[[], None]:
    """One call of the kernel on `problem`."""
    return lambda: problem.run("cpu")


class DiffusersStep:
    """Guidance and one UniPC-3 step of diffusers in the steady state: third order, corrector on, far from both ends."""

    STEPS, FIRST, LAST = 60, 4, 55

    def __init__(self, shape: tuple[int, ...]) -> None:
        import diffusers

        generator = torch.Generator().manual_seed(SEED)
        self.start, self.cond, self.uncond = (torch.randn(shape, generator=generator) for _ in range(3))
        self.guided, self.sample, self.at = torch.zeros(shape), self.start, self.LAST
        scheduler: Any = diffusers.UniPCMultistepScheduler
        self.scheduler = scheduler(solver_order=3, beta_schedule="scaled_linear")

    def prepare(self, calls: int) -> None:
        """Begin again, past the warm-up of the method, when `calls` more steps would reach the last ones."""
        if self.at + calls < self.LAST:
            return
        self.scheduler.set_timesteps(self.STEPS)
        self.sample, self.at = self.start, 0
        for _ in range(self.FIRST):
            self.call()

    def call(self) -> None:
        torch.sub(self.cond, self.uncond, out=self.guided).mul_(4.0).add_(self.uncond)
        timestep = self.scheduler.timesteps[self.at]
        self.sample = self.scheduler.step(self.guided, timestep, self.sample, return_dict=False)[0]
        self.at += 1


def speedup_vs_diffusers(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Time of guidance and scheduler step in diffusers over that of the fused row, in the steady state."""
    name = "kernels.solver_step.speedup_vs_diffusers"
    require_extension()
    try:
        peers = {shape: DiffusersStep(shape) for shape in PEER_SHAPES}
    except ImportError as error:
        return [], Claim(name, ">=", 5.0, f"diffusers cannot be imported ({error}); run make bench-setup")
    found, ours, theirs = [], [], []
    for shape, peer in peers.items():
        problem = Problem.of(shape)
        check(problem)
        candidates = {
            "cpu": Candidate(problem_call(problem)),
            "diffusers": Candidate(peer.call, peer.prepare),
            **copies(problem.bytes),
        }
        times = interleave(candidates, seconds=6 if quick else 15, least=11)
        case = f"unipc3 guided, {'x'.join(map(str, shape))}"
        for backend in ("cpu", "diffusers"):
            row = describe(backend, case, shape, "float32", problem.bytes, times)
            found.append(row | {"over_diffusers": times["diffusers"].median / times[backend].median})
        ours.append(times["cpu"])
        theirs.append(times["diffusers"])
    value, interval = ratio_of_medians(theirs, ours, SEED)
    how = (
        f"geometric mean over {' and '.join(row['case'].split(', ')[1] for row in found[::2])}, float32, "
        f"{torch.get_num_threads()} threads each, tensors allocated beforehand; diffusers: guidance in place, then "
        "UniPCMultistepScheduler.step of order 3 in its steady state; medians of interleaved rounds"
    )
    return found, Claim(name, ">=", 5.0, how, value, (interval[0], interval[1]), len(ours[0].ms))


CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {
    "kernels.solver_step.bandwidth_fraction": bandwidth_fraction,
    "kernels.solver_step.speedup_vs_diffusers": speedup_vs_diffusers,
}
