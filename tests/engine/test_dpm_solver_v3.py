"""DPM-Solver-v3 against a transcription of the paper's algorithms, its neutral tables, and what it refuses."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vivace.bench import oracle
from vivace.engine.bind import ModelSpec
from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.lower import Given, lower_plan
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Plan, TensorRef, coefs
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.engine.tables import KIND
from vivace.engine.timesteps import make_grid
from vivace.errors import ArgumentError, ModelError

EDM, FLOW = NoiseSchedule.edm(math.exp(-4.0), math.exp(4.0)), NoiseSchedule.flow()
VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
END = {"final": "sigma_min", "grid": "logsnr"}
SHAPE = (2,)
NOISE = torch.as_tensor(np.random.default_rng(5).normal(size=(16, 2)))
SEVEN = oracle.Mixture.seven()


def smooth(lam, seed):
    """A smooth random function of lam for every element, [n, *SHAPE]."""
    draw = np.random.default_rng(seed)
    rate, phase, size = (draw.uniform(low, high, SHAPE) for low, high in ((0.3, 0.9), (0.0, 6.0), (0.1, 0.35)))
    return size * np.sin(rate * np.asarray(lam)[:, None] + phase)


def table_of(nodes=161, low=-6.0, high=6.0, dtype=np.float64, **changes):
    lam = np.linspace(low, high, nodes)
    arrays = {"lam": lam, "l": 0.7 + smooth(lam, 1), "s": -0.2 + smooth(lam, 2), "b": smooth(lam, 3)}
    arrays = {**arrays, **changes}
    kept = {name: np.asarray(array, np.float64 if name == "lam" else dtype) for name, array in arrays.items()}
    return CalibrationTable(KIND, "callable", kept, {"method": "dpm_solver_v3", "latent_shape": list(SHAPE)})


def neutral(nodes=9):
    one, zero = np.ones((nodes, *SHAPE)), np.zeros((nodes, *SHAPE))
    return table_of(nodes, l=one, s=zero, b=zero)


# ---------------------------------------------------------------- the paper, in a loop over x
class Paper:
    """Algorithms 1 to 4 on a dense grid of lam: cumulative Simpson sums in place of the trapezoids of the paper."""

    def __init__(self, table, levels, data):
        self.alpha, self.sigma = (np.array(values) for values in zip(*levels, strict=True))
        self.lam = np.log(self.alpha / self.sigma)
        self.data = data
        nodes = np.asarray(table.arrays["lam"])
        # between two nodes of the table or two levels of the run the integrands are smooth: 40 parts each
        edges = np.union1d(nodes, self.lam)
        edges = edges[(edges >= self.lam[0]) & (edges <= self.lam[-1])]
        parts = [np.linspace(a, b, 41)[:-1] for a, b in zip(edges, edges[1:], strict=False)]
        self.fine = np.concatenate((*parts, edges[-1:]))
        self.l, s, b = (self._spread(nodes, table.arrays[name]) for name in ("l", "s", "b"))
        self.L, self.S = self._cumulative(self.l), self._cumulative(s)
        self.I = self._cumulative(np.exp(self.L + self.S))
        self.B = self._cumulative(np.exp(-self.S) * b)
        self.C = self._cumulative(np.exp(self.L + self.S) * self.B)
        self.at = [int(np.argmin(np.abs(self.fine - lam))) for lam in self.lam]

    def _spread(self, nodes, values):
        flat = np.asarray(values).reshape(len(nodes), -1).T
        return np.stack([np.interp(self.fine, nodes, row) for row in flat], axis=1)

    def _cumulative(self, values):
        """int from the first point: cubic through four neighbours inside every run of 40 parts."""
        runs = (len(self.fine) - 1) // 40
        v = np.concatenate((values[:-1].reshape(runs, 40, -1), values[40::40].reshape(runs, 1, -1)), axis=1)
        h = np.diff(self.fine).reshape(runs, 40)[:, :1, None]
        inner = -v[:, :-3] + 13 * v[:, 1:-2] + 13 * v[:, 2:-1] - v[:, 3:]
        first = 9 * v[:, :1] + 19 * v[:, 1:2] - 5 * v[:, 2:3] + v[:, 3:4]
        last = 9 * v[:, -1:] + 19 * v[:, -2:-1] - 5 * v[:, -3:-2] + v[:, -4:-3]
        sums = np.cumsum((h / 24 * np.concatenate((first, inner, last), axis=1)).reshape(-1, v.shape[2]), axis=0)
        return np.concatenate((np.zeros_like(sums[:1]), sums))

    def eps(self, x, i):
        x0 = self.data.x0(torch.as_tensor(x), float(self.alpha[i]), float(self.sigma[i])).numpy()
        return (x - self.alpha[i] * x0) / self.sigma[i]

    def g(self, x, eps, s, i):
        f = (self.sigma[i] * eps - self.l[self.at[i]] * x) / self.alpha[i]
        a, b = self.at[s], self.at[i]
        return np.exp(self.S[a] - self.S[b]) * f - np.exp(self.S[a]) * (self.B[b] - self.B[a])

    def E(self, s, t, n):
        """int e^(L + S - L_s - S_s) (lam - lam_s)^n / n!."""
        a, b = self.at[s], self.at[t]
        run = np.exp(self.L + self.S - self.L[a] - self.S[a])
        run = run * ((self.fine - self.fine[a]) ** n)[:, None] / math.factorial(n)
        total = self._cumulative(run)
        return total[b] - total[a]

    def derivatives(self, nodes, g, pseudo):
        lam = self.lam[nodes]
        n = len(nodes) - 1
        if not pseudo:
            matrix = np.stack([(lam[1:] - lam[0]) ** k for k in range(1, n + 1)], axis=1)
            change = np.stack([value - g[0] for value in g[1:]]).reshape(n, -1)
            found = np.linalg.solve(matrix, change).reshape(n, *g[0].shape)
            return [math.factorial(k + 1) * found[k] for k in range(n)]
        columns = [list(g)]
        for k in range(1, n + 1):
            before = columns[-1]
            columns.append([(before[j] - before[j + 1]) / (lam[j] - lam[j + k]) for j in range(n + 1 - k)])
        return [math.factorial(k) * columns[k][0] for k in range(1, n + 1)]

    def update(self, x, s, t, nodes, seen, pseudo):
        """x at level t from x at level s; seen: (x, eps) by level."""
        a, b = self.at[s], self.at[t]
        g = [self.g(*seen[i], s, i) for i in nodes]
        out = self.alpha[t] / self.alpha[s] * np.exp(self.L[a] - self.L[b]) * x
        out = out - self.alpha[t] * np.exp(-self.L[b] - self.S[a]) * (self.I[b] - self.I[a]) * g[0]
        out = out - self.alpha[t] * np.exp(-self.L[b]) * (self.C[b] - self.C[a] - self.B[a] * (self.I[b] - self.I[a]))
        for n, slope in enumerate(self.derivatives(nodes, g, pseudo) if len(nodes) > 1 else [], 1):
            out = out - self.alpha[t] * np.exp(self.L[a] - self.L[b]) * self.E(s, t, n) * slope
        return out

    def run(self, x, order, corrector, pseudo, c_pseudo, lower=True):
        steps, seen, p = len(self.alpha) - 1, {}, 0
        for i in range(steps):
            eps = self.eps(x, i)
            seen[i] = (x, eps)
            c = p + c_pseudo
            if corrector(i) and c > 1 and i:
                nodes = [i - 1, i, *range(i - 2, i - 1 - (c - 1), -1)]
                fixed = self.update(seen[i - 1][0], i - 1, i, nodes, seen, c_pseudo)
                slope = self.l[self.at[i]]
                kept = self.sigma[i] * eps - slope * x
                x, eps = fixed, (kept + slope * fixed) / self.sigma[i]
                seen[i] = (x, eps)
            p = min(i + 1, order)
            p = min(p, steps - i) if lower else p
            x = self.update(x, i, i + 1, list(range(i, i - p, -1)), seen, pseudo)
        return x


def ours(schedule, steps, prediction, **options):
    plan = make_plan(schedule, "dpm_solver_v3", steps, prediction=prediction, **{**END, **options})
    return plan, sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE).numpy()


def levels_of(plan, schedule, steps):
    grid = make_grid(schedule, steps, **END)
    assert [(step.alpha, step.sigma) for step in plan.steps] == [grid.level(i) for i in range(steps)]
    return [grid.level(i) for i in range(steps + 1)]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("pseudo", "c_pseudo"), [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("corrector", ["all", "noisy", "none"])
def test_the_papers_algorithms(order, pseudo, c_pseudo, corrector):
    steps, table = 7, table_of()
    options = {"order": order, "corrector": corrector, "pseudo": pseudo, "pseudo_corrector": c_pseudo, "table": table}
    plan, got = ours(VP, steps, "eps", **options)
    levels = levels_of(plan, VP, steps)
    late = {"all": lambda i: True, "none": lambda i: False, "noisy": lambda i: plan.steps[i].timestep > 499.5}
    want = Paper(table, levels, SEVEN).run(NOISE.numpy(), order, late[corrector], pseudo, c_pseudo)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("schedule", [EDM, VP])
def test_every_prediction_and_schedule(prediction, schedule):
    plan, got = ours(schedule, 6, prediction, table=table_of())
    start = NOISE.numpy() * (plan.init[0].terms[0][1])
    want = Paper(table_of(), levels_of(plan, schedule, 6), SEVEN).run(start, 3, lambda i: True, False, True)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- neutral tables and numbers
def rows_of(schedule, solver, steps=7, prediction="eps", **options):
    return make_plan(schedule, solver, steps, prediction=prediction, **options).steps


@pytest.mark.parametrize("schedule", [EDM, VP, FLOW])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("table", [None, neutral()])
def test_neutral_statistics_are_the_rows_of_dpm_solver_pp(schedule, final, order, table):
    kind = "flow" if schedule is FLOW else "eps"
    got = rows_of(schedule, "dpm_solver_v3", 7, kind, final=final, order=order, corrector="none", table=table)
    assert got == rows_of(schedule, "lagrange", 7, kind, final=final, order=order, form="x0", variable="lam")
    named, options = {1: ("ddim", {}), 2: ("dpmpp_2m", {"variant": "heun"}), 3: ("dpmpp_3m", {})}[order]
    same = rows_of(schedule, named, 7, kind, final=final, **options)
    for one, two in zip(got, same, strict=True):
        mine, theirs = (dict(step.ops[-1].terms) for step in (one, two))
        if order > 1:  # ddim keeps no history: its rows read the output itself
            assert mine.keys() == theirs.keys()
            for slot, weight in mine.items():
                assert weight == pytest.approx(theirs[slot], rel=1e-12)


def test_numbers_of_dpm_solver_give_its_results():
    options = {"final": "sigma_min", "grid": "logsnr"}
    for order in (1, 2, 3):
        given = {"order": order, "corrector": "none", "l": 0.0, "s": -1.0}
        plan = make_plan(VP, "dpm_solver_v3", 8, **options, **given)
        base = make_plan(VP, "lagrange", 8, order=order, form="eps", variable="lam", **options)
        got, want = (sample(oracle.denoiser_for(SEVEN, made), made, NOISE) for made in (plan, base))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)
        assert not plan.tensors


def test_a_neutral_table_with_its_corrector_is_a_plan_of_numbers():
    assert make_plan(VP, "dpm_solver_v3", 8, table=neutral()).steps == make_plan(VP, "dpm_solver_v3", 8).steps
    assert not make_plan(VP, "dpm_solver_v3", 8, table=neutral()).tensors


# ---------------------------------------------------------------- what statistics are good for
def test_with_the_statistics_of_a_gaussian_one_step_is_exact():
    """Of a Gaussian, l and b are known in closed form: f does not depend on x, so s = 0 and order 1 is enough."""
    data = oracle.Gaussian(
        torch.tensor([0.4, -1.0], dtype=torch.float64), torch.tensor([0.5, 1.2], dtype=torch.float64)
    )
    lam = np.linspace(-4.0, 4.0, 801)[:, None]
    square, mean, variance = np.exp(-2 * lam), data.mean.numpy(), data.variance.numpy()
    gain = variance + square
    table = table_of(801, -4.0, 4.0, l=square / gain, s=np.zeros((801, 2)), b=2 * square * variance / gain**2 * mean)
    plan = make_plan(EDM, "dpm_solver_v3", 3, order=1, corrector="none", table=table, **END)
    got = sample(oracle.denoiser_for(data, plan), plan, NOISE)
    start = math.exp(4.0) * NOISE
    want = data.solve(start, (1.0, math.exp(4.0)), (1.0, math.exp(-4.0)))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4 * start.abs().max())  # l, b are linear between the nodes


@pytest.mark.parametrize(
    ("order", "corrector", "pseudo_corrector", "measured"),
    [(1, "none", True, 1), (2, "none", True, 2), (3, "none", True, 3), (1, "all", True, 2), (3, "all", False, 3)],
)
def test_order_of_convergence_with_any_numbers(order, corrector, pseudo_corrector, measured):
    options = {"order": order, "corrector": corrector, "pseudo_corrector": pseudo_corrector}
    options |= {"lower_order_final": False, "l": 0.6, "s": -0.3, "b": 0.2}
    assert oracle.measured_order("dpm_solver_v3", options, warm_up=measured) > measured - 0.1


# ---------------------------------------------------------------- rows, files, recipes
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_row_is_one_pass_over_memory(guidance):
    plan = make_plan(VP, "dpm_solver_v3", 8, table=table_of(), **END)
    plan = plan if guidance == 1.0 else apply_guidance(plan, guidance)
    numbers = {info.key: number for number, info in enumerate(plan.tensors)}
    lowered = lower_plan(plan, Given({"guidance_scale": guidance}), numbers)
    assert [last - first for first, last in lowered.spans] == [1] * 8


def test_files_tails_and_plans_made_again(tmp_path):
    table_of().save(tmp_path / "table.safetensors")
    plan = make_plan(VP, "dpm_solver_v3", 8, table=tmp_path / "table.safetensors", **END)
    assert sum(isinstance(coef, TensorRef) for op in plan.ops() for coef in coefs(op)) > 40
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.hash == plan.hash
    denoiser = oracle.denoiser_for(SEVEN, plan)
    assert torch.equal(sample(denoiser, loaded, NOISE), sample(denoiser, plan, NOISE))
    assert plan.again() == plan and plan.again(steps=5).nfe == 5
    tail = plan.tail(0.5)
    assert len(tail.steps) == 4 and [step.alpha for step in tail.steps] == [step.alpha for step in plan.steps[4:]]
    half = make_plan(VP, "dpm_solver_v3", 8, table=table_of(dtype=np.float32), **END)
    assert {info.dtype for info in half.tensors} == {"float32"} and {info.dtype for info in plan.tensors} == {"float64"}


def test_a_table_of_another_model_or_shape_is_refused():
    table = table_of()
    plan = make_plan(VP, "dpm_solver_v3", 5, table=table, prediction="eps")
    spec = ModelSpec("toy", "another", "eps", (2,), 1, (), branches=("cond",))
    with pytest.raises(ModelError, match="measured on model callable"):
        plan.bind(spec)
    with pytest.raises(ModelError, match="latent shape"):
        plan.bind(replace(spec, fingerprint="callable", latent_shape=(3,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "1..3"),
        ({"order": 0}, "1..3"),
        ({"corrector": "half"}, "corrector"),
        ({"corrector": True}, "corrector"),
        ({"pseudo": 1}, "pseudo"),
        ({"l": math.nan}, "l must be"),
        ({"s": "0"}, "s must be"),
        ({"table": neutral(), "b": 0.5}, "either a table or numbers"),
        ({"table": 3}, "table is int"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        make_plan(VP, "dpm_solver_v3", 5, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {"lam": np.zeros(161)},
        {"b": np.zeros((160, 2))},
        {"s": np.full((161, 2), np.nan)},
        {"l": np.ones((161, 3))},
        {"lam": np.linspace(4, -4, 161)},
    ],
)
def test_tables_that_do_not_fit_are_refused(changes):
    with pytest.raises(ModelError, match="calibrate again"):
        make_plan(VP, "dpm_solver_v3", 5, table=table_of(**changes))


def test_a_table_without_an_array_or_for_another_method_is_refused():
    arrays = dict(table_of().arrays)
    del arrays["s"]
    with pytest.raises(ModelError, match="no array 's'"):
        make_plan(VP, "dpm_solver_v3", 5, table=CalibrationTable(KIND, "callable", arrays, {"method": "dpm_solver_v3"}))
    with pytest.raises(ModelError, match="score_calibration"):
        made = CalibrationTable(KIND, "callable", dict(table_of().arrays), {"method": "score_calibration"})
        make_plan(VP, "dpm_solver_v3", 5, table=made)


def test_many_plans_with_tensors_share_a_session():
    """More tensors than a session numbers at once: those of plans that nothing runs are let go."""
    problem = Problem.of_callable(oracle.schedule_denoiser(SEVEN, EDM, "eps"), EDM, "eps", (2,))
    first = problem.plan("dpm_solver_v3", 40, table=table_of(), **END)
    want = problem.run(first, range(2))
    for steps in (41, 42, 43, 44, 45):
        problem.run(problem.plan("dpm_solver_v3", steps, table=table_of(), **END), range(2))
    assert torch.equal(problem.run(first, range(2)), want)
    assert len(problem.session.pool.tensors) <= 1024
