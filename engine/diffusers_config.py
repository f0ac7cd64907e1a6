"""Configs of the covered `diffusers` schedulers: fields with defaults, the values covered, a request's numbers.

Every field of a covered class is honoured or refused by its name; fields of other classes are ignored, as `diffusers`
does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vivace.engine.noise_schedule import FloatArray
from vivace.engine.plan import Step, Transform
from vivace.engine.solvers.rows import planned_ages
from vivace.engine.timesteps import SPACINGS, Grid
from vivace.errors import UnsupportedError

Rows = Callable[[int], tuple[Step, ...]]  # rows from a first step on
PREDICTION_TYPES = {
    "epsilon": "eps",
    "sample": "x0",
    "original_sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}

_TRAINING = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_LATENT = {**_TRAINING, "beta_start": 0.00085, "beta_end": 0.012}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_RESCALED = {"rescale_betas_zero_snr": False}
_REGRIDS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW_SIGMAS = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_LEADING, _LINSPACE = {"timestep_spacing": "leading"}, {"timestep_spacing": "linspace"}
_ENDS = {"final_sigmas_type": "zero"}
_MULTISTEP = {**_TRAINING, **_THRESHOLD, **_REGRIDS, **_FLOW_SIGMAS, "solver_order": 2, "lower_order_final": True}
_DDIM = {**_TRAINING, **_THRESHOLD, **_CLIP, **_LEADING, **_RESCALED, "set_alpha_to_one": True}
_DDPM = {**_TRAINING, **_THRESHOLD, **_CLIP, **_LEADING, **_RESCALED, "variance_type": "fixed_small"}
_EDM = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    **_ENDS,
}
_FLOW_MATCH = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    **_REGRIDS,
    "time_shift_type": "exponential",
}
# Fields of each covered class with their defaults.
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "CogVideoXDDIMScheduler": {
        **_LATENT,
        "beta_schedule": "scaled_linear",
        **_CLIP,  # stored, never applied
        "sample_max_value": 1.0,
        **_LEADING,
        **_RESCALED,
        "set_alpha_to_one": True,
        "snr_shift_scale": 3.0,
    },
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "EulerDiscreteScheduler": {
        **_TRAINING,
        **_REGRIDS,
        **_LINSPACE,
        **_RESCALED,
        **_ENDS,
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
    },
    "EulerAncestralDiscreteScheduler": {**_TRAINING, **_LINSPACE, **_RESCALED},
    "HeunDiscreteScheduler": {**_LATENT, **_REGRIDS, **_CLIP, "clip_sample": False, **_LINSPACE},
    "KDPM2DiscreteScheduler": {**_LATENT, **_REGRIDS, **_LINSPACE},
    "KDPM2AncestralDiscreteScheduler": {**_LATENT, **_REGRIDS, **_LINSPACE},
    "LMSDiscreteScheduler": {**_TRAINING, **_REGRIDS, **_LINSPACE},
    "DPMSolverMultistepScheduler": {
        **_MULTISTEP,
        **_LINSPACE,
        **_RESCALED,
        **_ENDS,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "DPMSolverSinglestepScheduler": {
        **{field: value for field, value in _MULTISTEP.items() if field != "steps_offset"},
        **_ENDS,
        "lower_order_final": False,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "DEISMultistepScheduler": {**_MULTISTEP, **_LINSPACE, "algorithm_type": "deis", "solver_type": "logrho"},
    "UniPCMultistepScheduler": {
        **_MULTISTEP,
        **_LINSPACE,
        **_RESCALED,
        **_ENDS,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": [],
        "solver_p": None,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "PNDMScheduler": {**_TRAINING, **_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "IPNDMScheduler": {"num_train_timesteps": 1000, "trained_betas": None},
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": {
        **_EDM,
        **_THRESHOLD,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
    },
    "LCMScheduler": {
        **_LATENT,
        "beta_schedule": "scaled_linear",
        **_THRESHOLD,
        **_CLIP,
        "clip_sample": False,
        **_LEADING,
        **_RESCALED,
        "original_inference_steps": 50,
        "set_alpha_to_one": True,
        "timestep_scaling": 10.0,
    },
    "FlowMatchEulerDiscreteScheduler": {**_FLOW_MATCH, "stochastic_sampling": False},
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
    "FlowMatchLCMScheduler": {**_FLOW_MATCH, "scale_factors": None, "upscale_mode": "bicubic"},
}
# Values that are covered: field -> values, or (class, field) -> values where a class has its own.
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
COVERED: Mapping[Any, tuple[Any, ...]] = {
    "beta_schedule": _BETA_SCHEDULES,
    ("HeunDiscreteScheduler", "beta_schedule"): (*_BETA_SCHEDULES, "exp"),
    ("DDPMScheduler", "beta_schedule"): (*_BETA_SCHEDULES, "laplace", "sigmoid"),
    ("DDPMParallelScheduler", "beta_schedule"): (*_BETA_SCHEDULES, "sigmoid"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    ("EulerDiscreteScheduler", "prediction_type"): ("epsilon", "sample", "original_sample", "v_prediction"),
    **{
        (name, "prediction_type"): ("epsilon", "v_prediction")
        for name in FIELDS
        if name.startswith(("EulerAncestral", "KDPM2", "PNDM", "EDM"))
    },
    **{
        (name, "prediction_type"): tuple(kind for kind in PREDICTION_TYPES if kind != "original_sample")
        for name in FIELDS
        if "use_flow_sigmas" in FIELDS[name]
    },
    "variance_type": (None, "learned", "learned_range"),  # the network's mean is all that is used
    ("DDPMScheduler", "variance_type"): ("fixed_small", "fixed_small_log", "fixed_large"),
    ("DDPMParallelScheduler", "variance_type"): ("fixed_small", "fixed_small_log", "fixed_large"),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"),
    ("DPMSolverSinglestepScheduler", "algorithm_type"): ("dpmsolver", "dpmsolver++", "sde-dpmsolver++", "deis"),
    ("DEISMultistepScheduler", "algorithm_type"): ("deis", "dpmsolver", "dpmsolver++"),
    ("EDMDPMSolverMultistepScheduler", "algorithm_type"): ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "timestep_spacing": SPACINGS,
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "sigma_schedule": ("karras", "exponential"),
    "solver_p": (None,),
    "invert_sigmas": (False, None),
    "scale_factors": (None,),
}


@dataclass(frozen=True)
class Request:
    """A config with all its fields, the request's own numbers, and the class's table of the training timesteps.

    own: what `set_timesteps` of the scheduler object put into the tables of `grids.RUN_TABLES`, for these steps.
    history, cached: of the multistep classes, what rows that did not compute everything mean to later ones.
    """

    name: str
    config: Mapping[str, Any]
    steps: int
    timesteps: list[float] | None
    sigmas: list[float] | None
    mu: float | None
    table: npt.NDArray[Any]
    strength: float | None = None
    own: Mapping[str, Any] | None = None
    history: str = "own"
    cached: tuple[int, ...] = ()

    def ages(self, orders: Sequence[int], first: int = 0) -> list[tuple[int, ...]]:
        """Of every row from `first` on the rows that it reads, see `solvers.rows.planned_ages`."""
        cached = [row - first for row in self.cached if row >= first]
        return planned_ages(self.name, len(orders), orders, self.history, cached)

    def __getitem__(self, field: str) -> Any:
        return self.config[field]

    @property
    def train_steps(self) -> int:
        return int(self.config["num_train_timesteps"])

    def own_table(self, name: str) -> FloatArray | None:
        """A table of the scheduler object's own run in float64, if there is one."""
        if self.own is None:
            return None
        given = self.sigmas if self.timesteps is None else self.timesteps
        if (self.own["steps"], self.own["given"]) != (self.steps, given):
            return None
        return np.asarray(self.own[name], dtype=np.float64)

    def refuse(self, field: str, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self.name}: {field}={self.config[field]!r} is not covered; {why}")


@dataclass(frozen=True)
class Made:
    """What a class runs: a level per step, the rows from a first step on, the factor of the first noise.

    tailed: the grid is already that of an image-to-image run of the request's strength.
    """

    grid: Grid
    prediction: str
    rows: Rows
    scale: float = 1.0
    steps: int | None = None
    tailed: bool = False


def read_fields(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of class `name`, those not given at their defaults. Raises UnsupportedError naming a field."""
    config = {**FIELDS[name], **given}
    for field in FIELDS[name]:
        covered = COVERED.get((name, field), COVERED.get(field))
        if covered is not None and config[field] not in covered:
            allowed = ", ".join(repr(value) for value in covered if value is not None) or "None"
            raise UnsupportedError(f"{name}: {field}={config[field]!r} is not covered; covered: {allowed}")
    modes = [field for field in _REGRIDS if config.get(field)]
    if len(modes) > 1:
        raise UnsupportedError(f"{name}: {modes[1]}=True is not covered together with {modes[0]}=True; choose one")
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
    kind = request.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction" and not request.config.get("use_flow_sigmas", True):
        raise request.refuse("prediction_type", "it needs use_flow_sigmas=True")
    return PREDICTION_TYPES[kind]


def transform_of(request: Request) -> Transform | None:
    """Dynamic thresholding of x0, or clipping, when the config asks for it; thresholding goes first."""
    if request.config.get("thresholding"):
        ratio, high = float(request["dynamic_thresholding_ratio"]), float(request["sample_max_value"])
        return Transform("dynamic_threshold", "m0", params=(("ratio", ratio), ("max", high)))
    if request.config.get("clip_sample"):
        limit = float(request["clip_sample_range"])
        return Transform("clamp", "m0", params=(("low", -limit), ("high", limit)))
    return None


def order_of(request: Request, highest: int) -> int:
    """solver_order in 1..highest."""
    order = request["solver_order"]
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise request.refuse("solver_order", f"covered: 1 to {highest}")
    return order


def regrid_of(request: Request) -> str | None:
    """ "karras", "exponential" or "beta" when the config re-spaces the sigmas so."""
    return next((mode for mode in ("karras", "exponential", "beta") if request.config.get(f"use_{mode}_sigmas")), None)
