"""What `set_timesteps` of the covered `diffusers` schedulers computes: tables, noise levels, timesteps.

Arithmetic follows their order and precision (tables and levels in float32), because integer timesteps are cut from it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vivace.engine.diffusers_config import Request, regrid_of
from vivace.engine.noise_schedule import KEEPS_TERMINAL_SIGNAL, FloatArray, alphas_cumprod_of, as_numpy
from vivace.engine.timesteps import Grid, spaced
from vivace.errors import ArgumentError

# Classes whose steps read alpha^2 of a timestep; the others read sigma/alpha.
BY_TIMESTEP = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "CogVideoXDDIMScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "PNDMScheduler",
    "LCMScheduler",
)

# Tables that torch computes in `set_timesteps`; a scheduler object's own are used, to the bit.
RUN_TABLES: Mapping[str, tuple[str, ...]] = {
    "IPNDMScheduler": ("betas", "alphas"),
    "EDMEulerScheduler": ("sigmas",),
    "EDMDPMSolverMultistepScheduler": ("sigmas",),
    "KDPM2DiscreteScheduler": ("sigmas_interpol",),
    "KDPM2AncestralDiscreteScheduler": ("sigmas_interpol", "sigmas_up", "sigmas_down"),
    "EulerDiscreteScheduler": ("sigmas",),
}
Array = npt.NDArray[Any]


# ---------------------------------------------------------------- tables of the training timesteps
def own_table(name: str, alphas_cumprod: Any) -> Array:
    """What the class keeps of every training timestep: alpha^2 (BY_TIMESTEP), sigma/alpha (the others).

    Computed by the arithmetic of `alphas_cumprod` itself (array or tensor), so that its levels agree to the bit.
    """
    if name in BY_TIMESTEP:
        return as_numpy(alphas_cumprod)
    return as_numpy(((1 - alphas_cumprod) / alphas_cumprod) ** 0.5)


def run_tables(
    name: str,
    scheduler: Any,
    config: Mapping[str, Any],
    steps: int,
    sigmas: list[float] | None,
    timesteps: list[float] | None = None,
) -> dict[str, Any] | None:
    """{"steps", "given", "timesteps", a list per table of RUN_TABLES} of a copy of the scheduler; None: it has none."""
    plain_euler = name == "EulerDiscreteScheduler" and config["interpolation_type"] == "linear"
    if name not in RUN_TABLES or plain_euler or not hasattr(scheduler, "set_timesteps"):
        return None
    made = copy.deepcopy(scheduler)
    if timesteps is not None:
        if name != "EulerDiscreteScheduler":
            return None
        made.set_timesteps(timesteps=timesteps)
    elif sigmas is None:
        made.set_timesteps(steps)
    elif name == "EDMEulerScheduler":
        made.set_timesteps(steps, sigmas=made.sigmas.double().new_tensor(sigmas))
    else:
        return None
    tables = {key: as_numpy(getattr(made, key)) for key in ("timesteps", *RUN_TABLES[name])}
    finite = {key: np.where(np.isfinite(table), table, 0.0).tolist() for key, table in tables.items()}
    return {"steps": steps, "given": sigmas if timesteps is None else timesteps, **finite}


def table_of_config(name: str, config: Mapping[str, Any]) -> Array:
    """The same from a config's beta fields, float64 [T]; empty for a class without."""
    if "beta_schedule" not in config:
        return np.zeros(0)
    fields = dict(config)
    if fields["trained_betas"] is None and fields["beta_schedule"] in ("exp", "laplace", "sigmoid"):
        fields["trained_betas"] = _betas(fields["beta_schedule"], fields)
    return own_table(name, alphas_cumprod_of(fields, name if name in BY_TIMESTEP else KEEPS_TERMINAL_SIGNAL[0]))


def _betas(kind: str, fields: Mapping[str, Any]) -> FloatArray:
    """Betas of the schedules "sigmoid", and "exp" and "laplace": 1 - f(t + 1/T) / f(t), at most 0.999."""
    count = int(fields["num_train_timesteps"])
    if kind == "sigmoid":
        low, high = float(fields["beta_start"]), float(fields["beta_end"])
        return np.asarray(low + (high - low) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, count))))
    t = np.arange(count + 1) / count
    if kind == "exp":
        level = np.exp(-12.0 * t)
    else:
        snr = np.exp(-0.5 * np.copysign(1.0, 0.5 - t) * np.log(1.0 - 2.0 * np.abs(0.5 - t) + 1e-6))
        level = np.sqrt(snr / (1.0 + snr))
    return np.asarray(np.minimum(1.0 - level[1:] / level[:-1], 0.999))


# ---------------------------------------------------------------- grids
def make_levels(times: Array, alphas: FloatArray, sigmas: FloatArray) -> Grid:
    """A `Grid` of arrays."""
    return Grid(tuple(map(float, times)), tuple(alphas.tolist()), tuple(sigmas.tolist()))


def squared_grid(times: Array, squares: Array) -> Grid:
    """The grid of VP levels alpha^2 [N + 1]."""
    values = squares.astype(np.float64)
    return make_levels(times, np.sqrt(values), np.sqrt(1.0 - values))


def exploding_grid(request: Request, sigmas: Array, times: Array) -> Grid:
    """The grid of sigmas [N + 1] with alpha = 1, rounded to float32."""
    levels = sigmas.astype(np.float32).astype(np.float64)
    require_falling(request, levels)
    return make_levels(times.astype(np.float32), np.ones(len(levels)), levels)


def sigma_grid(request: Request, sigmas: Array, last: float, fed: Array) -> Grid:
    """The grid of a scheduler's sigmas: t of a flow with `use_flow_sigmas`, else sigma/alpha of VP; timesteps cut."""
    levels = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    require_falling(request, levels)
    if request["use_flow_sigmas"] and levels[0] > 1.0:
        raise request.refuse("use_flow_sigmas", f"its grid here starts at sigma = {levels[0]:g}, where alpha < 0")
    alphas = 1.0 - levels if request["use_flow_sigmas"] else 1.0 / np.sqrt(levels**2 + 1.0)
    return make_levels(fed.astype(np.int64), alphas, levels if request["use_flow_sigmas"] else levels * alphas)


def flow_grid(request: Request, levels: Array, fed: Array) -> Grid:
    """The grid of flow levels t [N] and 0, rounded to float32."""
    values = np.append(levels.astype(np.float32).astype(np.float64), 0.0)
    require_falling(request, values)
    return make_levels(fed, 1.0 - values, values)


def require_falling(request: Request, levels: FloatArray) -> None:
    """Noise levels above 0 fall from row to row; only the final level may repeat the last one."""
    if not np.isfinite(levels).all() or (levels[:-1] <= 0.0).any():
        raise ArgumentError(f"{request.name}: needs finite noise levels above 0, got {levels[:-1].min():g}")
    rises = np.append(levels[1:-1] >= levels[:-2], levels[-1] > levels[-2] * (1.0 + 1e-5))
    if rises.any():
        row = int(np.argmax(rises))
        raise ArgumentError(
            f"{request.name}: noise must fall from row to row, but level {row + 1} ({levels[row + 1]:g}) is not below "
            f"level {row} ({levels[row]:g}); use fewer steps or another spacing"
        )


# ---------------------------------------------------------------- the classes
def exploding_sigmas(request: Request) -> tuple[Array, Array]:
    """Sigmas [N + 1] and timesteps [N] of the Euler, Heun, LMS and KDPM2 classes: sigma/alpha, no rounding of t."""
    steps, count, table = request.steps, request.train_steps, request.table
    logs, regrid = np.log(table), regrid_of(request)
    fed: Array
    if request.timesteps is not None and regrid:
        raise ArgumentError(f"{request.name}: timesteps cannot be given with use_{regrid}_sigmas=True")
    if request.sigmas is not None:
        given = np.asarray(request.sigmas).astype(np.float32)
        return given, nearest_timesteps(given[:-1], logs)
    if request.timesteps is not None:
        fed = np.asarray(request.timesteps).astype(np.float32)
    elif request["timestep_spacing"] == "linspace":
        fed = np.linspace(0, count - 1, steps, dtype=np.float32)[::-1]
    else:
        fed = spaced(request["timestep_spacing"], count, steps, offset=request["steps_offset"], points=steps)
    if request.config.get("interpolation_type") == "log_linear":  # N + 1 points: it never reaches the final level
        sigmas = np.exp(np.linspace(float(logs[-1]), float(logs[0]), steps + 1))
    else:
        sigmas = np.interp(fed, np.arange(count), table)
    last = float(table[0]) if request.config.get("final_sigmas_type") == "sigma_min" else 0.0
    if regrid:
        sigmas = regridded(regrid, *_ends(request, float(sigmas[-1]), float(sigmas[0])), steps)
        fed = nearest_timesteps(sigmas, logs)
        if regrid == "karras" and request.name.startswith("KDPM2"):
            fed = fed.round()
    rows = len(sigmas) if is_continuous(request) else steps  # timesteps of every level but the last, or N
    if "interpolation_type" in request.config:
        own_sigmas, own_fed = request.own_table("sigmas"), request.own_table("timesteps")
        if own_sigmas is not None and own_fed is not None:
            return own_sigmas[: rows + 1], own_fed
    return np.append(sigmas, last)[: rows + 1], np.resize(fed, rows)


def is_continuous(request: Request) -> bool:
    """Whether EulerDiscreteScheduler feeds log(sigma) / 4."""
    return request.config.get("timestep_type") == "continuous" and request["prediction_type"] == "v_prediction"


def dpm_sigmas(request: Request) -> tuple[Array, Array, float]:
    """Sigmas, timesteps (uncut) and the final level of the DPM-Solver and DEIS classes."""
    steps, count, table = request.steps, request.train_steps, request.table
    regrid, logs = regrid_of(request), np.log(table)
    modes = [f"use_{regrid}_sigmas"] if regrid else []
    modes += [mode for mode in ("use_lu_lambdas", "use_flow_sigmas") if request.config.get(mode)]
    if request.timesteps is not None and modes:
        raise ArgumentError(f"{request.name}: timesteps cannot be given with {modes[0]}=True")
    if request.mu is not None and not (request["use_dynamic_shifting"] and request["time_shift_type"] == "exponential"):
        raise ArgumentError(f"{request.name}: mu needs use_dynamic_shifting=True and time_shift_type='exponential'")
    last = float(table[0]) if request.config.get("final_sigmas_type") in ("sigma_min", None) else 0.0
    mode = "lu" if request.config.get("use_lu_lambdas") and regrid != "karras" else regrid
    if mode is not None:
        if mode == "lu":
            sigmas = np.exp(float(logs[-1]) + np.linspace(0, 1, steps) * (float(logs[0]) - float(logs[-1])))
        else:
            sigmas = regridded(mode, float(table[0]), float(table[-1]), steps)
        fed = nearest_timesteps(sigmas, logs)
        if request.name != "DPMSolverMultistepScheduler" or request["beta_schedule"] != "squaredcos_cap_v2":
            fed = fed.round() if mode in ("karras", "lu") else fed
    elif request["use_flow_sigmas"]:
        shift = request["flow_shift"] if request.mu is None else math.exp(request.mu)
        sigmas = np.flip(shifted(1.0 - np.linspace(1, 1 / count, steps + 1), shift))[:-1]
        fed = sigmas * count
    else:
        if request.timesteps is not None:
            fed = np.asarray(request.timesteps).astype(np.int64).astype(np.float64)
        else:
            clip = request.config.get("lambda_min_clipped", -math.inf)
            until = count - int(np.searchsorted(-np.log(table[::-1]), clip))
            spacing = request.config.get("timestep_spacing", "linspace")
            fed = spaced(spacing, count, steps, offset=request.config.get("steps_offset", 0), last=until)
        return np.interp(fed, np.arange(count), table), fed, last
    return sigmas, fed, last if "final_sigmas_type" in request.config else float(sigmas[-1])


def unipc_sigmas(request: Request) -> tuple[Array, Array, float]:
    """Sigmas, timesteps (uncut) and the level of `sigma_min` of UniPCMultistepScheduler."""
    steps, count, table, regrid = request.steps, request.train_steps, request.table, regrid_of(request)
    if request.sigmas is not None and not request["use_flow_sigmas"]:
        raise ArgumentError(f"{request.name}: sigmas can be given only with use_flow_sigmas=True")
    if request.sigmas is not None and regrid:
        raise ArgumentError(f"{request.name}: sigmas cannot be given with use_{regrid}_sigmas=True")
    if request["shift_terminal"] is not None and not request["use_flow_sigmas"]:
        raise ArgumentError(f"{request.name}: shift_terminal needs use_flow_sigmas=True")
    if request["use_dynamic_shifting"] and request.mu is None:
        raise ArgumentError(f"{request.name}: use_dynamic_shifting=True needs mu")
    if regrid:
        sigmas = regridded(regrid, *_ends(request, float(table[0]), float(table[-1])), steps)
        if not (request["use_flow_sigmas"] and regrid == "karras"):
            fed = nearest_timesteps(sigmas, np.log(table))
            return sigmas, fed.round() if regrid == "karras" else fed, float(sigmas[-1])
        sigmas = sigmas / (sigmas + 1)
    elif request["use_flow_sigmas"]:
        sigmas = np.linspace(1, 1 / count, steps + 1)[:-1] if request.sigmas is None else np.asarray(request.sigmas)
        if request["use_dynamic_shifting"]:
            sigmas = dynamically_shifted(request, sigmas)
        else:
            sigmas = shifted(sigmas, request["flow_shift"])
        if request["shift_terminal"]:
            sigmas = stretched(sigmas, request["shift_terminal"])
        if abs(sigmas[0] - 1) < 1e-6:  # its way round log 0; ours would not need it, its levels do
            sigmas = np.append(sigmas[0] - 1e-6, sigmas[1:])
    else:
        fed = spaced(request["timestep_spacing"], count, steps, offset=request["steps_offset"])
        return np.interp(fed, np.arange(count), table), fed, float(table[0])
    return sigmas, sigmas * count, float(sigmas[-1])


def flow_sigmas(request: Request) -> tuple[Array, Array]:
    """Levels t and timesteps of the flow matching classes: sigmas, shift, stretch to `shift_terminal`, re-spacing.

    The ends of the default grid are shifted already, so they are shifted twice.
    """
    count, shift, config = request.train_steps, request["current_shift"], request.config
    if request.timesteps is not None and request.sigmas is not None and len(request.timesteps) != len(request.sigmas):
        raise ArgumentError(f"timesteps: {len(request.timesteps)} given, but {len(request.sigmas)} sigmas")
    ends = np.asarray([count, 1], dtype=np.float32) / np.float32(count)
    if not config.get("use_dynamic_shifting"):
        ends = shifted(ends, request["shift"])
    given = None if request.timesteps is None else np.asarray(request.timesteps, dtype=np.float32)
    sigmas: Array
    if request.sigmas is not None:
        sigmas = np.asarray(request.sigmas, dtype=np.float32)
    elif given is not None:
        sigmas = given / count
    else:
        sigmas = np.linspace(float(ends[0]) * count, float(ends[1]) * count, request.steps) / count
    sigmas = dynamically_shifted(request, sigmas) if config.get("use_dynamic_shifting") else shifted(sigmas, shift)
    if config.get("shift_terminal"):
        sigmas = stretched(sigmas, config["shift_terminal"])
    regrid = regrid_of(request)
    if regrid:
        sigmas = regridded(regrid, float(sigmas[-1]), float(sigmas[0]), request.steps)
    return sigmas, given if given is not None else sigmas.astype(np.float32) * np.float32(count)


def edm_sigmas(request: Request) -> tuple[Array, Array]:
    """Sigmas [N + 1], rounded to float32, and timesteps log(sigma) / 4 of the EDM classes.

    EDMEulerScheduler takes explicit `sigmas` as positions in [0, 1] on its grid; so does this.
    """
    low, high = float(request["sigma_min"]), float(request["sigma_max"])
    ramp = np.linspace(0.0, 1.0, request.steps) if request.sigmas is None else np.asarray(request.sigmas)
    if request["sigma_schedule"] == "karras":
        rho = float(request["rho"])
        sigmas = np.asarray((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho)
    else:
        sigmas = np.exp(np.linspace(math.log(low), math.log(high), len(ramp)))[::-1]
    end = low if request.name.startswith("EDMDPM") else float(sigmas[-1])
    levels: FloatArray = np.append(sigmas, end if request["final_sigmas_type"] == "sigma_min" else 0.0)
    levels = levels.astype(np.float32).astype(np.float64)
    fed = 0.25 * np.log(levels[:-1])
    own_levels, own_fed = request.own_table("sigmas"), request.own_table("timesteps")
    if own_levels is not None and own_fed is not None:
        levels, fed = own_levels, own_fed
    require_falling(request, levels)
    return levels, fed


def _ends(request: Request, low: float, high: float) -> tuple[float, float]:
    """Ends of a re-spaced grid: the fields sigma_min and sigma_max where a class has them and they are given."""
    given = request.config.get("sigma_min"), request.config.get("sigma_max")
    return low if given[0] is None else float(given[0]), high if given[1] is None else float(given[1])


# ---------------------------------------------------------------- pieces
def regridded(kind: str, low: float, high: float, steps: int) -> FloatArray:
    """N sigmas from high down to low: "karras" (rho 7), "exponential" (even in log sigma), "beta" (its quantiles).

    Source: Karras et al. 2022, eq. 5; Lee et al. 2024 (Beta sampling), Beta(0.6, 0.6).
    """
    if kind == "karras":
        first, last = high ** (1 / 7.0), low ** (1 / 7.0)
        return np.asarray((first + np.linspace(0, 1, steps) * (last - first)) ** 7.0)
    if kind == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    return np.array([low + beta_quantile(p) * (high - low) for p in (1 - np.linspace(0, 1, steps)).tolist()])


def beta_quantile(p: float, shape: float = 0.6) -> float:
    """x with I_x(shape, shape) = p, p in [0, 1]: the quantile of the symmetric Beta distribution.

    From the power series of the integral of (t (1 - t))^(shape - 1) below 1/2, mirrored above, by bisection. The median
    is one rounding above 1/2, as scipy has it: levels halfway between two float32 numbers then round alike.
    """
    if p in (0.0, 1.0):
        return p
    if p == 0.5:
        return math.nextafter(0.5, 1.0)
    if p > 0.5:
        return 1.0 - beta_quantile(1.0 - p, shape)
    total = math.gamma(shape) ** 2 / math.gamma(2.0 * shape)
    factors, factor = [], 1.0
    for n in range(60):
        factors.append(factor / (shape + n))
        factor *= (n + 1.0 - shape) / (n + 1.0)
    low, high = 0.0, 0.5
    for _ in range(80):
        x = 0.5 * (low + high)
        below = x**shape * math.fsum(weight * x**n for n, weight in enumerate(factors)) < p * total
        low, high = (x, high) if below else (low, x)
    return 0.5 * (low + high)


def nearest_timesteps(sigmas: Array, logs: Array) -> FloatArray:
    """Timesteps at which log sigma, linear between training timesteps, takes these values; clipped to the table."""
    wanted = np.log(np.maximum(sigmas, 1e-10))
    reached = wanted[:, None] >= logs  # the table need not rise at its end, where rescale_betas_zero_snr is set
    below = np.where(reached.any(axis=1), len(logs) - 1 - reached[:, ::-1].argmax(axis=1), 0).clip(0, len(logs) - 2)
    low, high = logs[below], logs[below + 1]
    share = np.clip((low - wanted) / (low - high), 0, 1)
    return np.asarray((1 - share) * below + share * (below + 1))


def shifted(sigmas: Array, shift: float) -> Array:
    """shift s / (1 + (shift - 1) s). Source: Esser et al. 2024, eq. 23."""
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))


def dynamically_shifted(request: Request, sigmas: Array) -> Array:
    """m / (m + 1/s - 1) with m = e^mu ("exponential") or mu ("linear")."""
    if request.mu is None:
        raise ArgumentError(f"{request.name}: use_dynamic_shifting=True needs mu")
    factor = math.exp(request.mu) if request["time_shift_type"] == "exponential" else request.mu
    return np.asarray(factor / (factor + (1 / sigmas - 1) ** 1.0))


def stretched(sigmas: Array, terminal: float) -> Array:
    """1 - s scaled so that the last sigma is `terminal`."""
    rest = 1 - sigmas
    if rest[-1] == 0.0:
        raise ArgumentError(f"shift_terminal={terminal}: one step at pure noise cannot be stretched; use more steps")
    return np.asarray(1 - rest / (rest[-1] / (1 - terminal)))
