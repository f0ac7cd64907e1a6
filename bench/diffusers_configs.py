"""Random configs and requests of the `diffusers` schedulers that plans are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """A scheduler class, its config, the arguments of `set_timesteps`, and the seed of its first noise."""

    name: str
    config: Mapping[str, Any]
    request: Mapping[str, Any]
    seed: int

    def ours(self) -> dict[str, Any]:
        """Arguments of `Plan.from_diffusers`."""
        return {**self.request}

    def theirs(self) -> dict[str, Any]:
        """Arguments of `set_timesteps`."""
        named = {("num_inference_steps" if key == "steps" else key): value for key, value in self.request.items()}
        if self.name != "LCMScheduler":
            named.pop("strength", None)
        if "sigmas" in named:
            import torch

            named["sigmas"] = np.asarray(named["sigmas"], dtype=np.float64)
            if self.name.startswith("EDM"):
                named |= {"sigmas": torch.from_numpy(named["sigmas"]), "num_inference_steps": len(named["sigmas"])}
        return named


class Chooser:
    """A generator of field values."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def of(self, *values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def maybe(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def within(self, low: float, high: float) -> float:
        return round(float(self.rng.uniform(low, high)), 3)


def random_case(rng: np.random.Generator, name: str | None = None) -> Case:
    """One case: a class, at random if not named, then its fields."""
    pick = Chooser(rng)
    name = name or pick.of(*CLASSES)
    config, request = CLASSES[name](pick)
    if "steps" not in request and not {"timesteps", "sigmas"} & set(request):
        request = {"steps": _steps(pick), **request}
    if request.get("steps", 1) > 1 and name != "IPNDMScheduler" and config.get("skip_prk_steps", True):
        if pick.maybe(0.15):
            request["strength"] = pick.within(1.01 / request["steps"], 0.99)
    return Case(name, config, request, int(rng.integers(1 << 31)))


def _steps(pick: Chooser) -> int:
    return int(pick.of(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 23, 25, 30, 40, 50))


def _betas(pick: Chooser, *more: str) -> dict[str, Any]:
    """The training schedule."""
    kind = pick.of("linear", "scaled_linear", "squaredcos_cap_v2", "trained", "default", *more)
    count = int(pick.of(1000, 1000, 1000, 500))
    if kind == "default":
        return {}
    if kind == "trained":
        return {"trained_betas": np.linspace(1e-4, 0.02, 1000).tolist()}
    return {"beta_schedule": kind, "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": count}


def _prediction(pick: Chooser, *kinds: str) -> dict[str, Any]:
    return {"prediction_type": pick.of(*(kinds or ("epsilon", "sample", "v_prediction")))}


def _spacing(pick: Chooser) -> dict[str, Any]:
    return {"timestep_spacing": pick.of("linspace", "leading", "trailing"), "steps_offset": int(pick.of(0, 0, 1))}


def _clip(pick: Chooser) -> dict[str, Any]:
    """Thresholding, clipping or neither."""
    kind = pick.of("threshold", "clip", "none")
    if kind == "threshold":
        return {**_threshold(pick, 1.0), "clip_sample": pick.maybe(0.5)}
    return {"clip_sample": kind == "clip", "clip_sample_range": pick.within(0.7, 1.5)}


def _threshold(pick: Chooser, share: float) -> dict[str, Any]:
    if not pick.maybe(share):
        return {}
    ratio, high = pick.within(0.5, 1.0), pick.within(1.0, 2.0)
    return {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": high}


def _regrid(pick: Chooser, *more: str) -> dict[str, Any]:
    kind = pick.of("none", "none", "karras", "exponential", "beta", *more)
    return {} if kind == "none" else {f"use_{kind}_lambdas" if kind == "lu" else f"use_{kind}_sigmas": True}


def _final(pick: Chooser) -> dict[str, Any]:
    return {"final_sigmas_type": pick.of("zero", "sigma_min")}


def _rescaled(pick: Chooser) -> dict[str, Any]:
    return {"rescale_betas_zero_snr": True} if pick.maybe(0.15) else {}


def _falling(pick: Chooser, high: float, low: float, digits: int = 0) -> list[float]:
    """Falling numbers for explicit timesteps or sigmas."""
    values = np.sort(pick.rng.uniform(low, high, size=int(pick.of(1, 2, 4, 7, 16))))[::-1]
    unique = sorted({round(float(value), digits) for value in values}, reverse=True)
    return [int(value) for value in unique] if digits == 0 else unique


def _ddim(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {**_betas(pick), **_prediction(pick), **_spacing(pick), **_clip(pick), **_rescaled(pick)}
    return {**config, "set_alpha_to_one": pick.maybe(0.5)}, {}


def _cogvideox(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {**_betas(pick), **_prediction(pick), **_spacing(pick), **_rescaled(pick)}
    return {**config, "set_alpha_to_one": pick.maybe(0.5), "snr_shift_scale": pick.of(3.0, 1.0, 2.3)}, {}


def _ddpm(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {**_betas(pick, "sigmoid"), **_prediction(pick), **_spacing(pick), **_clip(pick), **_rescaled(pick)}
    config["variance_type"] = pick.of("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
    return config, {"timesteps": _falling(pick, 499, 0)} if pick.maybe(0.15) else {}


def _pndm(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {**_betas(pick), **_prediction(pick, "epsilon", "v_prediction"), **_spacing(pick)}
    return {**config, "set_alpha_to_one": pick.maybe(0.5), "skip_prk_steps": pick.maybe(0.6)}, {}


def _lcm(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {**_betas(pick), **_prediction(pick), **_clip(pick), **_rescaled(pick)}
    config |= {"original_inference_steps": int(pick.of(50, 50, 25, 100)), "timestep_scaling": pick.of(10.0, 1.0)}
    if pick.maybe(0.15):
        return config, {"timesteps": _falling(pick, 499, 0)}
    return config, {"steps": int(pick.of(1, 2, 3, 4, 6, 8, 16))}


def _ipndm(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    if pick.maybe(0.1):
        return {"trained_betas": np.linspace(0.99, 0.01, 20).tolist()}, {}
    return {}, {}


def _euler(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {**_betas(pick), **_spacing(pick), **_rescaled(pick), **_regrid(pick), **_final(pick)}
    config |= _prediction(pick, "epsilon", "sample", "v_prediction", "original_sample")
    config |= {"interpolation_type": pick.of("linear", "linear", "log_linear")}
    config |= {"timestep_type": pick.of("discrete", "discrete", "continuous")}
    if pick.maybe(0.2):
        config |= {"sigma_min": pick.within(0.03, 0.2), "sigma_max": pick.within(5.0, 20.0)}
    if pick.maybe(0.1):
        return config, {"timesteps": _falling(pick, 499, 1)}
    if pick.maybe(0.1):
        return config, {"sigmas": [*_falling(pick, 14.0, 0.1, 3), 0.0]}
    return config, {}


def _ancestral(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {**_betas(pick), **_spacing(pick), **_rescaled(pick)}
    return {**config, **_prediction(pick, "epsilon", "v_prediction")}, {}


def _heun(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {**_betas(pick, "exp"), **_spacing(pick), **_regrid(pick), **_prediction(pick)}
    config |= {"clip_sample": pick.maybe(0.3), "clip_sample_range": pick.within(0.7, 1.5)}
    return config, {"timesteps": _falling(pick, 499, 1)} if pick.maybe(0.1) else {}


def _kdpm2(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {**_betas(pick), **_spacing(pick), **_regrid(pick)}
    return {**config, **_prediction(pick, "epsilon", "v_prediction")}, {}


def _lms(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    return {**_betas(pick), **_spacing(pick), **_regrid(pick), **_prediction(pick)}, {}


def _flow_sigmas(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    """use_flow_sigmas with its shift, and mu where it is dynamic."""
    kinds = ("flow_prediction", "flow_prediction", "flow_prediction", "epsilon", "sample", "v_prediction")
    config = {"use_flow_sigmas": True, "flow_shift": pick.of(1.0, 3.0, 5.0), **_prediction(pick, *kinds)}
    if pick.maybe(0.3):
        return {**config, "use_dynamic_shifting": True}, {"mu": pick.within(0.3, 1.2)}
    return config, {}


def _dpm(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of DPM-Solver multistep."""
    config = {**_betas(pick), **_spacing(pick), **_threshold(pick, 0.15), "solver_order": int(pick.of(1, 2, 2, 3, 3))}
    request: dict[str, Any] = {}
    kind = pick.of("dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
    config |= {"algorithm_type": kind, "solver_type": pick.of("midpoint", "heun"), **_final(pick)}
    config |= {"lower_order_final": pick.maybe(0.6), "euler_at_final": pick.maybe(0.3)}
    if not kind.endswith("++") and pick.maybe(0.9):
        config["final_sigmas_type"] = "sigma_min"
    if pick.maybe(0.2):
        flow, request = _flow_sigmas(pick)
        return {**config, **flow}, request
    config |= {**_prediction(pick), **_regrid(pick, "lu"), **_rescaled(pick)}
    if pick.maybe(0.1):
        config["lambda_min_clipped"] = -5.1
    if pick.maybe(0.05):
        config["variance_type"] = "learned_range"
    return config, {"timesteps": _falling(pick, 499, 0)} if pick.maybe(0.1) else request


def _singlestep(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config, request = _dpm(pick)
    if config["algorithm_type"] == "sde-dpmsolver":
        config["algorithm_type"] = "sde-dpmsolver++"
    gone = ("timestep_spacing", "steps_offset", "euler_at_final", "rescale_betas_zero_snr", "use_lu_lambdas")
    return {field: value for field, value in config.items() if field not in gone}, request


def _deis(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {**_betas(pick), **_spacing(pick), **_threshold(pick, 0.15), "solver_order": int(pick.of(1, 2, 3, 3))}
    config |= {"lower_order_final": pick.maybe(0.6), "solver_type": pick.of("logrho", "bh2", "midpoint")}
    if pick.maybe(0.2):
        flow, request = _flow_sigmas(pick)
        return {**config, **flow}, request
    return {**config, **_prediction(pick), **_regrid(pick)}, {}


def _unipc(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {**_betas(pick), **_spacing(pick), **_threshold(pick, 0.15), "solver_order": int(pick.of(1, 2, 2, 3, 3))}
    config |= {"lower_order_final": pick.maybe(0.7), "solver_type": pick.of("bh1", "bh2", "bh2", "midpoint")}
    config |= {"predict_x0": pick.maybe(0.7), "disable_corrector": pick.of([], [], [0], [0, 1, 2]), **_final(pick)}
    if pick.maybe(0.25):
        flow, request = _flow_sigmas(pick)
        config |= flow
        if pick.maybe(0.2):
            config["shift_terminal"] = pick.within(0.02, 0.2)
        if "mu" in request:
            config["time_shift_type"] = pick.of("exponential", "linear")
        if pick.maybe(0.2):
            config["use_karras_sigmas"] = True
        elif pick.maybe(0.2):
            request["sigmas"] = _falling(pick, 1.0, 0.05, 3)
        return config, request
    if pick.maybe(0.1):
        config |= {"sigma_min": pick.within(0.03, 0.2), "sigma_max": pick.within(5.0, 20.0)}
    return {**config, **_prediction(pick), **_regrid(pick), **_rescaled(pick)}, {}


def _edm(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {"sigma_schedule": pick.of("karras", "exponential"), **_prediction(pick, "epsilon", "v_prediction")}
    config |= {"rho": pick.of(7.0, 5.0), **_final(pick), "sigma_data": pick.of(0.5, 0.5, 1.0)}
    return {**config, "sigma_min": pick.within(0.002, 0.05), "sigma_max": pick.within(20.0, 100.0)}, {}


def _edm_euler(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config, request = _edm(pick)
    if pick.maybe(0.1):
        request["sigmas"] = sorted(_falling(pick, 1.0, 0.0, 3))
    return config, request


def _edm_dpm(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config, request = _edm(pick)
    config |= {"solver_order": int(pick.of(1, 2, 2, 3)), "solver_type": pick.of("midpoint", "heun")}
    config |= {"algorithm_type": pick.of("dpmsolver++", "dpmsolver++", "sde-dpmsolver++"), **_threshold(pick, 0.15)}
    return {**config, "lower_order_final": pick.maybe(0.6), "euler_at_final": pick.maybe(0.3)}, request


def _flow_lcm(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of flow matching without its solver."""
    config: dict[str, Any] = {"shift": pick.of(1.0, 3.0, 1.7), **_regrid(pick)}
    config["num_train_timesteps"] = int(pick.of(1000, 1000, 500))
    request: dict[str, Any] = {}
    if pick.maybe(0.3):
        config |= {"use_dynamic_shifting": True, "time_shift_type": pick.of("exponential", "linear")}
        request["mu"] = pick.within(0.3, 1.2)
    if pick.maybe(0.15):
        config["shift_terminal"] = pick.within(0.02, 0.2)
    if pick.maybe(0.02):
        config["invert_sigmas"] = True
    if pick.maybe(0.15):
        request["sigmas"] = _falling(pick, 1.0, 0.05, 3)
    elif pick.maybe(0.1):
        request["timesteps"] = _falling(pick, 499.0, 5.0, 1)
    return config, request


def _flow_euler(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    config, request = _flow_lcm(pick)
    return {**config, "stochastic_sampling": pick.maybe(0.2)}, request


def _flow_heun(pick: Chooser) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"shift": pick.of(1.0, 3.0, 1.7), "num_train_timesteps": int(pick.of(1000, 500))}, {}


CLASSES: Mapping[str, Callable[[Chooser], tuple[dict[str, Any], dict[str, Any]]]] = {
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,
    "CogVideoXDDIMScheduler": _cogvideox,
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "PNDMScheduler": _pndm,
    "LCMScheduler": _lcm,
    "IPNDMScheduler": _ipndm,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _ancestral,
    "HeunDiscreteScheduler": _heun,
    "KDPM2DiscreteScheduler": _kdpm2,
    "KDPM2AncestralDiscreteScheduler": _kdpm2,
    "LMSDiscreteScheduler": _lms,
    "DPMSolverMultistepScheduler": _dpm,
    "DPMSolverSinglestepScheduler": _singlestep,
    "DEISMultistepScheduler": _deis,
    "UniPCMultistepScheduler": _unipc,
    "EDMEulerScheduler": _edm_euler,
    "EDMDPMSolverMultistepScheduler": _edm_dpm,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "FlowMatchHeunDiscreteScheduler": _flow_heun,
    "FlowMatchLCMScheduler": _flow_lcm,
}
