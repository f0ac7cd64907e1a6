"""What `set_timesteps` of the covered `diffusers` schedulers computes: fields, tables, noise levels, timesteps.

Arithmetic follows their order and precision (tables and levels in float32), because integer timesteps are cut from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vivace.engine.noise_schedule import FloatArray, alphas_cumprod_of, as_numpy
from vivace.engine.plan import Transform
from vivace.engine.timesteps import SPACINGS, Grid, spaced
from vivace.errors import ArgumentError, UnsupportedError

PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}

# Fields of each covered class with their defaults.
_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "steps_offset": 0,
}
_MULTISTEP = {
    **_BETAS,
    "timestep_spacing": "linspace",
    "solver_order": 2,
    "lower_order_final": True,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "DDIMScheduler": {
        **_BETAS,
        "timestep_spacing": "leading",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
    },
    "DPMSolverMultistepScheduler": {
        **_MULTISTEP,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "UniPCMultistepScheduler": {
        **_MULTISTEP,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": [],
        "solver_p": None,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
}
# Values that this release does not cover: field -> the values it does.
COVERED: Mapping[str, tuple[Any, ...]] = {
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "invert_sigmas": (False, None),
    "stochastic_sampling": (False, None),
    "variance_type": (None,),
    "solver_p": (None,),
    "predict_x0": (True,),
    "algorithm_type": ("dpmsolver++", "deis"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": SPACINGS,
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
}


@dataclass(frozen=True)
class Request:
    """A config with all its fields, the request's own numbers, and the class's table of the training timesteps."""

    name: str
    config: Mapping[str, Any]
    steps: int
    timesteps: list[float] | None
    sigmas: list[float] | None
    mu: float | None
    table: npt.NDArray[Any]

    def __getitem__(self, field: str) -> Any:
        return self.config[field]

    @property
    def train_steps(self) -> int:
        return int(self.config["num_train_timesteps"])

    def refuse(self, field: str, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self.name}: {field}={self.config[field]!r} is not covered; {why}")


def read_fields(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of class `name`, those not given at their defaults. Raises UnsupportedError naming a field."""
    config = {**FIELDS[name], **given}
    for field, covered in COVERED.items():
        if field in FIELDS[name] and config[field] not in covered:
            allowed = ", ".join(repr(value) for value in covered if value is not None) or "None"
            raise UnsupportedError(f"{name}: {field}={config[field]!r} is not covered; covered: {allowed}")
    return config


def plain(name: str, field: str, value: Any) -> Any:
    """A config value as a JSON value. Raises UnsupportedError naming the field."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [plain(name, field, item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UnsupportedError(
        f"{name}: {field} holds a {type(value).__name__}, which is not covered; leave it at its default"
    )


def prediction_of(request: Request) -> str:
    """What the network returns, in the plan's terms."""
    kind, flow = request["prediction_type"], bool(request.config.get("use_flow_sigmas"))
    if kind not in PREDICTION_TYPES or kind == "flow_prediction" and request.name == "DDIMScheduler":
        raise request.refuse("prediction_type", f"covered: {', '.join(PREDICTION_TYPES)}")
    if kind == "flow_prediction" and not flow:
        raise request.refuse("prediction_type", "it needs use_flow_sigmas=True")
    if kind == "v_prediction" and flow:
        raise request.refuse("prediction_type", "with use_flow_sigmas=True the class converts it without its norm")
    return PREDICTION_TYPES[kind]


def threshold_of(request: Request) -> Transform | None:
    """Dynamic thresholding of x0, when the config asks for it."""
    if not request["thresholding"]:
        return None
    ratio, high = float(request["dynamic_thresholding_ratio"]), float(request["sample_max_value"])
    return Transform("dynamic_threshold", "m0", params=(("ratio", ratio), ("max", high)))


def order_of(request: Request, highest: int) -> int:
    """solver_order in 1..highest."""
    order = request["solver_order"]
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise request.refuse("solver_order", f"covered: 1 to {highest}")
    return order


# ---------------------------------------------------------------- grids
def make_levels(times: npt.NDArray[Any], alphas: FloatArray, sigmas: FloatArray) -> Grid:
    """A `Grid` of arrays."""
    return Grid(tuple(map(float, times)), tuple(alphas.tolist()), tuple(sigmas.tolist()))


def sigma_grid(request: Request, sigmas: npt.NDArray[Any], last: float, fed: npt.NDArray[Any]) -> Grid:
    """The grid of a scheduler's sigmas: t of a flow with `use_flow_sigmas`, else sigma/alpha of VP; timesteps cut."""
    levels = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    require_falling(request, levels)
    alphas = 1.0 - levels if request["use_flow_sigmas"] else 1.0 / np.sqrt(levels**2 + 1.0)
    return make_levels(fed.astype(np.int64), alphas, levels if request["use_flow_sigmas"] else levels * alphas)


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


def own_table(name: str, alphas_cumprod: Any) -> npt.NDArray[Any]:
    """What the class keeps of every training timestep: alpha^2 (DDIM), sigma/alpha (multistep).

    Computed by the arithmetic of `alphas_cumprod` itself (array or tensor), so that its levels agree to the bit.
    """
    if name == "DDIMScheduler":
        return as_numpy(alphas_cumprod)
    return as_numpy(((1 - alphas_cumprod) / alphas_cumprod) ** 0.5)


def table_of_config(name: str, config: Mapping[str, Any]) -> npt.NDArray[Any]:
    """The same from a config's beta fields, float64 [T]; empty for a class without."""
    return own_table(name, alphas_cumprod_of(config, name)) if "beta_schedule" in config else np.zeros(0)


def dpmpp_sigmas(request: Request) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Sigmas and timesteps of DPMSolverMultistepScheduler, uncut."""
    steps, count, table = request.steps, request.train_steps, request.table
    modes = [mode for mode in ("use_karras_sigmas", "use_lu_lambdas", "use_flow_sigmas") if request[mode]]
    if request.timesteps is not None and modes:
        raise ArgumentError(f"{request.name}: timesteps cannot be given with {modes[0]}=True")
    if request.mu is not None and not request["use_dynamic_shifting"]:
        raise ArgumentError(f"{request.name}: mu needs use_dynamic_shifting=True")
    if request["use_karras_sigmas"] or request["use_lu_lambdas"]:
        if request["use_karras_sigmas"]:
            sigmas = karras(float(table[0]), float(table[-1]), steps)
        else:
            logs = np.log(table)
            sigmas = np.exp(float(logs[-1]) + np.linspace(0, 1, steps) * (float(logs[0]) - float(logs[-1])))
        fed = nearest_timesteps(sigmas, np.log(table))
        return sigmas, fed if request["beta_schedule"] == "squaredcos_cap_v2" else fed.round()
    if request["use_flow_sigmas"]:
        shift = request["flow_shift"] if request.mu is None else math.exp(request.mu)
        sigmas = np.flip(shifted(1.0 - np.linspace(1, 1 / count, steps + 1), shift))[:-1]
        return sigmas, sigmas * count
    if request.timesteps is not None:
        fed = np.asarray(request.timesteps).astype(np.int64).astype(np.float64)
    else:
        last = count - int(np.searchsorted(-np.log(table[::-1]), request["lambda_min_clipped"]))
        fed = spaced(request["timestep_spacing"], count, steps, offset=request["steps_offset"], last=last)
    return np.interp(fed, np.arange(count), table), fed


def unipc_sigmas(request: Request) -> tuple[npt.NDArray[Any], npt.NDArray[Any], float]:
    """Sigmas, timesteps (uncut) and the level of `sigma_min` of UniPCMultistepScheduler."""
    steps, count, table = request.steps, request.train_steps, request.table
    if request.sigmas is not None and not request["use_flow_sigmas"]:
        raise ArgumentError(f"{request.name}: sigmas can be given only with use_flow_sigmas=True")
    if request.sigmas is not None and request["use_karras_sigmas"]:
        raise ArgumentError(f"{request.name}: sigmas cannot be given with use_karras_sigmas=True")
    if request["shift_terminal"] is not None and not request["use_flow_sigmas"]:
        raise ArgumentError(f"{request.name}: shift_terminal needs use_flow_sigmas=True")
    if request["use_dynamic_shifting"] and request.mu is None:
        raise ArgumentError(f"{request.name}: use_dynamic_shifting=True needs mu")
    if request["use_karras_sigmas"]:
        low, high = request["sigma_min"], request["sigma_max"]
        sigmas = karras(float(table[0]) if low is None else low, float(table[-1]) if high is None else high, steps)
        if not request["use_flow_sigmas"]:
            return sigmas, nearest_timesteps(sigmas, np.log(table)).round(), float(sigmas[-1])
        sigmas = sigmas / (sigmas + 1)
    elif request["use_flow_sigmas"]:
        if request.sigmas is None:
            sigmas = np.linspace(1, 1 / count, steps + 1)[:-1]
        else:
            sigmas = np.asarray(request.sigmas)
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


def karras(low: float, high: float, steps: int) -> FloatArray:
    """(high^(1/7) + i/(N-1) (low^(1/7) - high^(1/7)))^7. Source: Karras et al. 2022, eq. 5."""
    first, last = high ** (1 / 7.0), low ** (1 / 7.0)
    return np.asarray((first + np.linspace(0, 1, steps) * (last - first)) ** 7.0)


def nearest_timesteps(sigmas: FloatArray, logs: npt.NDArray[Any]) -> FloatArray:
    """Timesteps at which log sigma, linear between training timesteps, takes these values; clipped to the table."""
    wanted = np.log(np.maximum(sigmas, 1e-10))
    below = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(logs) - 2)
    low, high = logs[below], logs[below + 1]
    share = np.clip((low - wanted) / (low - high), 0, 1)
    return np.asarray((1 - share) * below + share * (below + 1))


def shifted(sigmas: npt.NDArray[Any], shift: float) -> npt.NDArray[Any]:
    """shift s / (1 + (shift - 1) s). Source: Esser et al. 2024, eq. 23."""
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))


def dynamically_shifted(request: Request, sigmas: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """m / (m + 1/s - 1) with m = e^mu ("exponential") or mu ("linear")."""
    if request.mu is None:
        raise ArgumentError(f"{request.name}: use_dynamic_shifting=True needs mu")
    factor = math.exp(request.mu) if request["time_shift_type"] == "exponential" else request.mu
    return np.asarray(factor / (factor + (1 / sigmas - 1) ** 1.0))


def stretched(sigmas: npt.NDArray[Any], terminal: float) -> npt.NDArray[Any]:
    """1 - s scaled so that the last sigma is `terminal`."""
    rest = 1 - sigmas
    if rest[-1] == 0.0:
        raise ArgumentError(f"shift_terminal={terminal}: one step at pure noise cannot be stretched; use more steps")
    return np.asarray(1 - rest / (rest[-1] / (1 - terminal)))
