"""Noise schedules: x_t = alpha(t) x0 + sigma(t) noise, lam(t) = log(alpha(t) / sigma(t)), all in float64.

Three kinds, each with its own time `t`:
  vp    alpha^2 + sigma^2 = 1; t = training timestep 0..T-1, log alpha linear in between    (Ho et al. 2020)
  edm   alpha = 1, sigma = t                                                                 (Karras et al. 2022)
  flow  alpha = 1 - t, sigma = t, t in [0, 1]                                                (Liu et al. 2022)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from vivace.engine.plan import Args
from vivace.errors import ArgumentError, UnsupportedError

FloatArray = npt.NDArray[np.float64]
T = TypeVar("T", float, FloatArray)

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# Classes that put this value in place of a terminal alpha^2 of zero, so that their first sigma is finite.
TINY_ALPHAS_CUMPROD = 2.0**-24
KEEPS_TERMINAL_SIGNAL = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha(t), sigma(t), lam(t) and their inverses. Made by `vp`, `edm`, `flow` or `from_diffusers`.

    kind: "vp" | "edm" | "flow"; source: the arguments that `restore` needs; train_steps: training timesteps, None for
    "edm"; shift: of flow grids; timestep_scale: timestep fed to the network = timestep_scale * t;
    sigma_min, sigma_max, rho: of "edm". Equality compares everything but the table, which follows from `source`.
    """

    kind: str
    source: Args
    train_steps: int | None
    shift: float = 1.0
    timestep_scale: float = 1.0
    sigma_min: float = 0.0
    sigma_max: float = 0.0
    rho: float = 7.0
    # VP: log alpha of the timesteps 0, 1, ...; without the last one where alpha is exactly 0 there.
    log_alphas: FloatArray = field(default_factory=lambda: np.zeros(0), compare=False, repr=False)

    @classmethod
    def vp(cls, betas: Any) -> NoiseSchedule:
        """alpha(t)^2 = prod_{s <= t} (1 - beta_s): variance preserving, discrete time.

        Args:
            betas: [T], in [0, 1], the first above 0; a last beta of exactly 1 is zero terminal SNR (alpha = 0).
        Raises: ArgumentError.
        Source: Ho, Jain and Abbeel 2020, eq. 4; zero terminal SNR: Lin et al. 2023, algorithm 1.
        """
        table = _vector(betas, "betas")
        _require_range(table, "betas")
        product: FloatArray = np.cumprod(1.0 - table, dtype=np.float64)
        return cls._from_alphas_cumprod(product, Args.of({"kind": "vp", "betas": table.tolist()}))

    @classmethod
    def edm(cls, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> NoiseSchedule:
        """alpha = 1, sigma = t: variance exploding; the network is fed sigma.

        Args:
            sigma_min, sigma_max: smallest and largest noise level of grids, 0 < sigma_min < sigma_max.
            rho: exponent of the Karras grid, above 0.
        Raises: ArgumentError.
        Source: Karras, Aittala, Aila and Laine 2022, eq. 5 and table 1.
        """
        low, high, power = _number(sigma_min, "sigma_min"), _number(sigma_max, "sigma_max"), _number(rho, "rho")
        if not 0.0 < low < high or power <= 0.0:
            raise ArgumentError(
                f"edm: needs 0 < sigma_min < sigma_max and rho > 0, got sigma_min={low}, sigma_max={high}, rho={power}"
            )
        source = Args.of({"kind": "edm", "sigma_min": low, "sigma_max": high, "rho": power})
        return cls("edm", source, None, sigma_min=low, sigma_max=high, rho=power)

    @classmethod
    def flow(cls, shift: float = 1.0, *, timestep_scale: float = 1.0, train_steps: int = 1000) -> NoiseSchedule:
        """alpha = 1 - t, sigma = t: rectified flow. Grids are shifted: t <- shift t / (1 + (shift - 1) t).

        Args:
            shift: above 0; 1 leaves grids as they are.
            timestep_scale: the network is fed timestep_scale * t.
            train_steps: T; training timestep i of 0..T-1 is t = (i + 1) / T.
        Raises: ArgumentError.
        Source: Liu, Gong and Liu 2022, eq. 1; shift: Esser et al. 2024, eq. 23.
        """
        shift, scale = _number(shift, "shift"), _number(timestep_scale, "timestep_scale")
        if shift <= 0.0 or scale <= 0.0 or _number(train_steps, "train_steps") < 2:
            raise ArgumentError(
                "flow: needs shift > 0, timestep_scale > 0 and train_steps >= 2, "
                f"got shift={shift}, timestep_scale={scale}, train_steps={train_steps}"
            )
        source = Args.of({"kind": "flow", "shift": shift, "timestep_scale": scale, "train_steps": int(train_steps)})
        return cls("flow", source, int(train_steps), shift=shift, timestep_scale=scale)

    @classmethod
    def from_diffusers(cls, config: Any) -> NoiseSchedule:
        """The schedule of a `diffusers` scheduler: a config mapping, or an object with `.config`.

        An object's own table `alphas_cumprod` is used, cast to float64; from a mapping it is computed in float64 from
        `beta_schedule` (linear, scaled_linear, squaredcos_cap_v2) or `trained_betas`, and `rescale_betas_zero_snr`.
        Flow matching classes and `use_flow_sigmas` give `flow`; a dynamic shift depends on the request, so is left out.
        Raises: ArgumentError, UnsupportedError naming the field or the class.
        """
        fields, name = read_config(config)
        train_steps = int(fields.get("num_train_timesteps") or 1000)
        if name.startswith("FlowMatch") or fields.get("use_flow_sigmas"):
            shift = fields.get("shift", fields.get("flow_shift", 1.0))
            dynamic = fields.get("use_dynamic_shifting")
            return cls.flow(1.0 if dynamic else shift, timestep_scale=train_steps, train_steps=train_steps)
        table = getattr(config, "alphas_cumprod", None)
        if table is not None:
            values = as_numpy(table).astype(np.float64)
        elif (
            "beta_schedule" in fields or "trained_betas" in fields or name in (*KEEPS_TERMINAL_SIGNAL, "DDIMScheduler")
        ):
            values = alphas_cumprod_of(fields, name)
        else:
            raise UnsupportedError(f"{name or 'config'}: has no beta_schedule, trained_betas or flow matching shift")
        return cls._from_alphas_cumprod(values, Args.of({"kind": "vp", "alphas_cumprod": values.tolist()}))

    @classmethod
    def _from_alphas_cumprod(cls, table: FloatArray, source: Args) -> NoiseSchedule:
        _require_decreasing(table)
        ends_at_zero = table[-1] == 0.0
        log_alphas = 0.5 * np.log(table[:-1] if ends_at_zero else table)
        log_alphas.setflags(write=False)
        return cls("vp", source, len(table), log_alphas=log_alphas)

    def describe(self) -> Args:
        """The arguments from which `restore` makes this schedule again, ready for a recipe."""
        return self.source

    @classmethod
    def restore(cls, description: Args) -> NoiseSchedule:
        """The inverse of `describe`. Raises ArgumentError when the description is of no known kind."""
        values = description.to_dict()
        kind = values.pop("kind", None)
        if kind == "vp" and "alphas_cumprod" in values:
            return cls._from_alphas_cumprod(_vector(values["alphas_cumprod"], "alphas_cumprod"), description)
        makers: dict[str, Callable[..., NoiseSchedule]] = {"vp": cls.vp, "edm": cls.edm, "flow": cls.flow}
        if kind not in makers:
            raise ArgumentError(f"schedule description: unknown kind {kind!r}; known: {', '.join(makers)}")
        return makers[kind](**values)

    # ---------------------------------------------------------------- ends
    @property
    def noise_end(self) -> float:
        """t where sampling starts: T - 1 (vp), sigma_max (edm), 1 (flow)."""
        if self.kind == "vp":
            return float((self.train_steps or 1) - 1)
        return self.sigma_max if self.kind == "edm" else 1.0

    @property
    def data_end(self) -> float:
        """t of the smallest trained noise level: 0 (vp), sigma_min (edm), the shifted 1/T (flow)."""
        if self.kind == "vp":
            return 0.0
        return self.sigma_min if self.kind == "edm" else self.shifted(1.0 / (self.train_steps or 1))

    @property
    def finite_end(self) -> float:
        """`noise_end`, or where the log-SNR is infinite there, t one training step inside."""
        if self.kind == "flow":
            return self.shifted(1.0 - 1.0 / (self.train_steps or 1))
        return float(len(self.log_alphas) - 1) if self.kind == "vp" else self.noise_end

    # ---------------------------------------------------------------- functions of t
    def alpha(self, t: T) -> T:
        """alpha(t): the factor of x0. t: float or float64 [...]; returns the same kind. Raises ArgumentError."""
        return _like(t, self._alpha(self._checked(t)))

    def sigma(self, t: T) -> T:
        """sigma(t): the factor of the noise. t: float or float64 [...]; returns the same kind. Raises ArgumentError."""
        times = self._checked(t)
        if self.kind != "vp":
            return _like(t, times)
        inside = np.sqrt(-np.expm1(2.0 * self._log_alpha(times)))
        return _like(t, np.where(times <= len(self.log_alphas) - 1, inside, np.sqrt(1.0 - self._alpha(times) ** 2)))

    def lam(self, t: T) -> T:
        """lam(t) = log(alpha(t) / sigma(t)): -inf at pure noise, +inf without noise. Raises ArgumentError."""
        times = np.asarray(t, dtype=np.float64)
        with np.errstate(divide="ignore"):
            return _like(t, np.log(self.alpha(times)) - np.log(self.sigma(times)))

    def t_of_lam(self, lam: T) -> T:
        """The inverse of `lam`; VP: clipped to the trained range. lam: float or float64 [...], no NaN."""
        values = np.asarray(lam, dtype=np.float64)
        if np.isnan(values).any():
            raise ArgumentError("t_of_lam: lam is NaN")
        with np.errstate(over="ignore"):
            if self.kind == "edm":
                return _like(lam, np.exp(-values))
            if self.kind == "flow":
                return _like(lam, 1.0 / (1.0 + np.exp(values)))
            log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * values)
        last = len(self.log_alphas) - 1
        times = np.interp(-log_alpha, -self.log_alphas, np.arange(last + 1.0))
        if last + 1 == self.train_steps:
            return _like(lam, times)
        beyond = last + 1.0 - np.exp(log_alpha - self.log_alphas[last])
        return _like(lam, np.where(log_alpha < self.log_alphas[last], beyond, times))

    def t_of_sigma(self, sigma: T) -> T:
        """t of a noise level in the convention of explicit sigmas: VP sigma/alpha (clipped), EDM sigma, flow t."""
        if self.kind != "vp":
            return sigma
        with np.errstate(divide="ignore"):
            return _like(sigma, self.t_of_lam(-np.log(np.asarray(sigma, dtype=np.float64))))

    def timestep(self, t: T) -> T:
        """The timestep the network is fed at time t: timestep_scale * t."""
        return t * self.timestep_scale

    def shifted(self, t: T) -> T:
        """shift t / (1 + (shift - 1) t): the time shift of flow grids; the identity for the other kinds."""
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    # ---------------------------------------------------------------- inside
    def _checked(self, t: float | FloatArray) -> FloatArray:
        """t as an array inside the range of this schedule."""
        times = np.asarray(t, dtype=np.float64)
        high = math.inf if self.kind == "edm" else self.noise_end
        if not ((times >= 0.0) & (times <= high) & np.isfinite(times)).all():
            wrong = times[~((times >= 0.0) & (times <= high) & np.isfinite(times))].flat[0]
            raise ArgumentError(f"{self.kind} schedule: t = {wrong} is outside [0, {high:g}]")
        return times

    def _log_alpha(self, times: FloatArray) -> FloatArray:
        """log alpha, linear between training timesteps; constant beyond the last finite one."""
        return np.interp(times, np.arange(len(self.log_alphas)), self.log_alphas)

    def _alpha(self, times: FloatArray) -> FloatArray:
        """alpha; in the last interval before an alpha of exactly 0, where log alpha is infinite, alpha is linear."""
        if self.kind == "edm":
            return np.ones_like(times)
        if self.kind == "flow":
            return 1.0 - times
        beyond = np.maximum(times - (len(self.log_alphas) - 1), 0.0)
        return np.exp(self._log_alpha(times)) * (1.0 - beyond)


def read_config(config: Any) -> tuple[dict[str, Any], str]:
    """Fields and class name of a `diffusers` scheduler: a mapping, or an object with a mapping `.config`."""
    fields = config if isinstance(config, Mapping) else getattr(config, "config", None)
    if not isinstance(fields, Mapping):
        raise ArgumentError(f"expected a scheduler config (mapping) or a scheduler object, got {type(config).__name__}")
    name = fields.get("_class_name") or ("" if fields is config else type(config).__name__)
    return dict(fields), str(name)


def as_numpy(table: Any) -> npt.NDArray[Any]:
    """A 1-D table (array, list, or tensor on any device) as a numpy array of its own dtype."""
    if hasattr(table, "detach"):
        table = table.detach().cpu().numpy()
    return np.asarray(table)


def alphas_cumprod_of(fields: Mapping[str, Any], name: str = "") -> FloatArray:
    """alpha^2 of every training timestep from the beta fields of a config, float64 [T].

    linear: betas evenly spaced; scaled_linear: their square roots; squaredcos_cap_v2: Nichol and Dhariwal 2021, eq. 17,
    betas capped at 0.999; snr_shift_scale s: SNR / s, as CogVideoX (Yang et al. 2024); rescale_betas_zero_snr: Lin et
    al. 2023, algorithm 1. `name`: class, for its last value.
    """
    count = int(fields.get("num_train_timesteps") or 1000)
    start, end = float(fields.get("beta_start", 0.0001)), float(fields.get("beta_end", 0.02))
    kind = fields.get("beta_schedule", "linear")
    if fields.get("trained_betas") is not None:
        betas = _vector(as_numpy(fields["trained_betas"]), "trained_betas")
    elif kind == "linear":
        betas = np.linspace(start, end, count)
    elif kind == "scaled_linear":
        betas = np.linspace(math.sqrt(max(start, 0.0)), math.sqrt(max(end, 0.0)), count) ** 2
    elif kind == "squaredcos_cap_v2":
        level = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1.0 - level[1:] / level[:-1], 0.999)
    else:
        raise UnsupportedError(f"beta_schedule={kind!r}: known are {', '.join(BETA_SCHEDULES)}, or give trained_betas")
    _require_range(betas, "betas")
    table: FloatArray = np.cumprod(1.0 - betas, dtype=np.float64)
    shift = _number(fields.get("snr_shift_scale", 1.0), "snr_shift_scale")
    table = table / (shift + (1.0 - shift) * table)
    if fields.get("rescale_betas_zero_snr"):
        root = np.sqrt(table)
        table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        table[-1] = TINY_ALPHAS_CUMPROD if name in KEEPS_TERMINAL_SIGNAL else 0.0
    return table


def _like(t: T, values: FloatArray) -> T:
    """`values` as a float when `t` was one."""
    return values if isinstance(t, np.ndarray) else float(values)


def _number(value: Any, name: str) -> float:
    """A finite float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise ArgumentError(f"{name}: needs a finite number, got {value!r}")
    return float(value)


def _vector(values: Any, name: str) -> FloatArray:
    """A non-empty finite 1-D float64 array."""
    if isinstance(values, Sequence) or hasattr(values, "__array__"):
        try:
            array = np.asarray(as_numpy(values), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{name}: needs a list of numbers ({error})") from error
    else:
        raise ArgumentError(f"{name}: needs a list of numbers, got {type(values).__name__}")
    if array.ndim != 1 or array.size == 0:
        raise ArgumentError(f"{name}: needs a list of at least one number, got shape {array.shape}")
    if not np.isfinite(array).all():
        at = int(np.argmin(np.isfinite(array)))
        raise ArgumentError(f"{name}[{at}]: needs a finite number, got {array[at]}")
    return array


def _require_range(betas: FloatArray, name: str) -> None:
    """Betas lie in [0, 1]."""
    if not np.isfinite(betas).all() or betas.min() < 0.0 or betas.max() > 1.0:
        at = int(np.argmax(~((betas >= 0.0) & (betas <= 1.0))))
        raise ArgumentError(f"{name}[{at}] = {betas[at]}: every beta must lie in [0, 1]")


def _require_decreasing(table: FloatArray) -> None:
    """alpha^2 falls from below 1; only its last value may be 0."""
    if table.ndim != 1 or len(table) < 2:
        raise ArgumentError(f"betas: needs at least two training timesteps, got {table.size}")
    if not np.isfinite(table).all() or not 0.0 < table[0] < 1.0 or table[-1] < 0.0 or (table[:-1] <= 0.0).any():
        raise ArgumentError("betas: the first must lie in (0, 1), and only the last may be 1 (alpha 0)")
    if (np.diff(table) > 0.0).any():
        raise ArgumentError("alphas_cumprod: must not increase with the timestep")
