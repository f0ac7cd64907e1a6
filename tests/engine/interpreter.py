"""A plan run op by op in float64 numpy, and Gaussian data whose denoiser is known in closed form."""

from dataclasses import dataclass

import numpy as np

from vivace.engine.plan import Affine


def run_plan(plan, denoiser, noise, *, inputs=None, draw=None):
    """x0 [B, ...] of `denoiser(x, timestep, row)`; `draw(k)`: the k-th normal draw, k >= 1."""
    slots = {"noise:0": noise, **{f"input:{name}": value for name, value in (inputs or {}).items()}}
    for op in plan.init:
        apply(op, slots, draw)
    for row, step in enumerate(plan.steps):
        (out,) = step.outs
        slots[out] = denoiser(step.x_scale * slots[step.x], step.timestep, row)
        for op in step.ops:
            apply(op, slots, draw)
    return slots["x"]


def apply(op, slots, draw):
    if isinstance(op, Affine):
        for name, _ in op.terms:
            if name.startswith("noise:") and name not in slots:
                slots[name] = draw(int(name.removeprefix("noise:")))
        slots[op.dst] = sum(coef * slots[name] for name, coef in op.terms)
        return
    params, value = dict(op.params), slots[op.slot]
    if op.kind == "clamp":
        slots[op.slot] = value.clip(params["low"], params["high"])
    else:
        flat = np.abs(value).reshape(len(value), -1)
        bound = np.quantile(flat, params["ratio"], axis=1).clip(1.0, params["max"])
        bound = bound.reshape(-1, *[1] * (value.ndim - 1))
        slots[op.slot] = value.clip(-bound, bound) / bound


@dataclass
class Gaussian:
    """Data N(mean, diag(std^2)). Every prediction and the exact probability-flow map in closed form."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, size=4, seed=0):
        rng = np.random.default_rng(seed)
        return cls(rng.normal(size=size), rng.uniform(0.3, 1.5, size=size))

    def predict(self, kind, x, alpha, sigma):
        """E[kind | x_t = x] at a level."""
        spread = alpha**2 * self.std**2 + sigma**2
        x0 = self.mean + alpha * self.std**2 / spread * (x - alpha * self.mean)
        eps = sigma / spread * (x - alpha * self.mean)
        return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[kind]

    def denoiser(self, plan):
        """Reads the level from the plan's row."""
        levels = [(step.alpha, step.sigma) for step in plan.steps]
        return lambda x, timestep, row: self.predict(plan.prediction, x, *levels[row])

    def flow(self, x, start, end):
        """The exact solution of the probability-flow ODE from level `start` to level `end`."""
        (a, s), (b, r) = start, end
        scale = np.sqrt((b**2 * self.std**2 + r**2) / (a**2 * self.std**2 + s**2))
        return b * self.mean + scale * (x - a * self.mean)


def row(plan, index):
    """{slot: coefficient} of the update of x in one row, history by age: m of this row is "m:0"."""
    ops = [op for op in plan.steps[index].ops if isinstance(op, Affine)]
    ring = len({op.dst for step in plan.steps for op in step.ops} - {"x"})
    return {(f"m:{(index - int(name[1:])) % ring}" if name[0] == "m" else name): coef for name, coef in ops[-1].terms}
