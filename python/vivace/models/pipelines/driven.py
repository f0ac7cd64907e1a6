"""A pipeline's loop that follows a plan: timesteps, branches and fused steps from it, draws and start as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.engine.plan import Affine, Plan, Step
from vivace.engine.planning import replan
from vivace.engine.stepper import Stepper
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, ShapeError, StateError, UnsupportedError
from vivace.models.pipelines.adaptive import Adaptive
from vivace.models.pipelines.branches import batch_of, half, latent_of, output_of, twice, with_output
from vivace.models.pipelines.cached import CallCaches, Given, gives_again
from vivace.models.pipelines.calls import CallStyle
from vivace.models.pipelines.planned import Effective
from vivace.models.versions import version_of

Network = Callable[..., Any]

# Schedulers that draw in every step, in the last one for nothing.
_DRAW_TO_THE_END = frozenset(
    ("DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
)


def _evaluated(plan: Plan) -> tuple[Step, ...]:
    """The rows with an evaluation."""
    return tuple(step for step in plan.steps if step.variant is not None)


class Driven:
    """The rows of one call of `steps` steps. A silent plan leaves guidance and the combined prediction to the pipeline.

    style: of the pipeline's guidance, needed unless silent; guided: the call runs an unconditional branch; values:
    numbers of the call by input name.
    """

    def __init__(
        self, effective: Effective, steps: int, *, style: CallStyle | None, guided: bool, values: dict[str, float]
    ) -> None:
        plan = effective.plan
        if plan.steps[0].variant is None:
            raise UnsupportedError("row 0 of the plan has no evaluation; a pipeline's loop starts with one")
        self.plan, self.steps, self.silent, self.style = plan, steps, effective.silent, style
        self._memo = effective.memo
        self.guided, self.values = guided, values
        self.order = max(1, round(plan.nfe / steps))
        self.restarts = 0
        self.caches: CallCaches | None = None
        self.generator: Any = None  # of the call, whose seed merges of tokens draw by
        self.given: list[Given] = []  # by executed evaluation
        self._caching = gives_again(plan)
        self.changed = False  # a callback changed the latents
        self._rows = _evaluated(plan)
        self._numbers = tuple(i for i, step in enumerate(plan.steps) if step.variant is not None)
        self.adaptive = Adaptive(plan)
        self._at = 0  # evaluations of the full plan that lie behind
        self._left: tuple[Step, ...] | None = None  # evaluations of the run from `_base` of the full plan on
        self._base = 0
        self._stepper: Stepper | None = None
        self._outs: dict[str, Tensor] = {}
        self._calls = 0
        self._shown: Any = None
        self._returned: Tensor | None = None
        self._version = 0
        self._unscaled: Tensor | None = None
        self._samples = 0  # of a branch
        self._draw: Callable[[], Tensor] = torch.Tensor

    # --- what the pipeline asks its scheduler -----------------------------------------------------------------------
    def timesteps(self, like: Tensor) -> Tensor:
        """One timestep an evaluation, integers where the scheduler has integers and the plan too."""
        times = [step.timestep for step in self._rows]
        whole = not like.is_floating_point() and all(time.is_integer() for time in times)
        return torch.tensor(times, dtype=torch.int64 if whole else torch.float32, device=like.device)

    def sigmas(self) -> Tensor:
        """Noise levels of the evaluations and of the result."""
        return torch.tensor([*(step.sigma for step in self._rows), 0.0], dtype=torch.float32)

    @property
    def start_scale(self) -> float:
        """Scale of the start noise."""
        terms = (term for op in self.plan.init for term in op.terms)
        return next((float(coef) for slot, coef in terms if slot == "noise:0" and isinstance(coef, float)), 1.0)

    @property
    def pool_bytes(self) -> int:
        """Bytes of the slots."""
        return 0 if self._stepper is None else self._stepper.pool_bytes

    def begin(self, evaluation: int) -> None:
        """The run starts, or starts anew, at this evaluation of the full plan."""
        self._at = self._base = evaluation
        self._left, self.caches = _evaluated(self._tail(evaluation)[0]), None
        self.adaptive.restart()

    def scaled(self, sample: Tensor, timestep: Any) -> Tensor:
        """x_scale * sample: what the network reads in this row."""
        self._unscaled = sample
        scale = self._row(timestep).x_scale
        return sample if scale == 1.0 else sample * scale

    def noised(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """alpha * sample + sigma * noise at the level of the row of that timestep."""
        step = self._rows[self._find(timesteps)]
        return step.alpha * sample + step.sigma * noise

    # --- what the pipeline asks its network -------------------------------------------------------------------------
    def evaluate(self, name: str, networks: Mapping[str, Network], args: Any, kwargs: Any) -> tuple[Any, int]:
        """(what the pipeline is handed, branches evaluated) of one network call."""
        touched = self.changed or (self._returned is not None and version_of(self._returned) != self._version)
        if touched and not self._calls and self._stepper is not None and self._at % self.order == 0:
            self._restart()
        step = self._row()
        self._calls += 1
        step = self.adaptive.row(self._numbers[self._at], step)
        if self.silent or step.variant is None:
            batched = self.guided and self.style is not None and not self.style.separate
            return self._run(name, networks, self._handed(args, kwargs), args, kwargs), 1 + batched
        name = self._model(name, step.variant.model, networks)
        assert self.style is not None
        if not self.guided:
            result = self._run(name, networks, ("cond",), args, kwargs)
            self._outs = {"cond": output_of(result)}
            return result, 1
        network = partial(self._run, name, networks)
        if self.style.separate:
            return self._separate(step, network, args, kwargs)
        if self._calls > 1:  # a further call of the pipeline's own guidance, which the plan replaces
            own = batch_of(args, kwargs) == self._samples
            return (with_output(self._shown, self._outs["cond"]) if own else self._shown), 0
        return self._batched(step, network, args, kwargs)

    def _run(
        self, name: str, networks: Mapping[str, Network], branches: tuple[str, ...], args: Any, kwargs: Any
    ) -> Any:
        """A network's answer to a batch of these branches, with the caches of the row where the plan has any."""
        if not self._caching:
            return networks[name](*args, **kwargs)
        if self.caches is None:
            plan, latent = self._tail(self._base)[0], tuple(latent_of(args, kwargs).shape[1:])
            self.caches = CallCaches(plan, networks[name], self.silent, self.generator, latent, self.values)
        return self.caches.run(self._at - self._base, name, networks[name], branches, args, kwargs)

    def _handed(self, args: Any, kwargs: Any) -> tuple[str, ...]:
        """The branches of a call whose guidance is the pipeline's: by their rows, or by which call of a step it is."""
        style, batch = self.style, batch_of(args, kwargs)
        if self.guided and style is not None and not style.separate:
            self._samples = self._samples or batch // 2
            if batch == 2 * self._samples:
                return style.order
            return ("cond",) if self._calls == 1 else (f"call {self._calls}",)  # of skipped layers, say
        return ("cond", "uncond")[self._calls - 1 : self._calls] or (f"call {self._calls}",)

    def _model(self, asked: str, planned: str, networks: Mapping[str, Network]) -> str:
        """The network of a row: the plan's where it names several, else the one the pipeline calls."""
        if len({variant.model for variant in self.plan.variants}) == 1:
            return asked
        name = next(iter(networks)) if planned == "main" else planned
        if name not in networks:
            raise UnsupportedError(f"the plan's row evaluates model {planned!r}; the pipeline has {sorted(networks)}")
        return name

    def _separate(self, step: Step, network: Network, args: Any, kwargs: Any) -> tuple[Any, int]:
        if self._calls == 1:
            self._shown = network(("cond",), args, kwargs)
            self._outs = {"cond": output_of(self._shown)}
            return self._shown, 1
        if self._calls == 2 and "uncond" in step.branches:
            self._outs["uncond"] = output_of(network(("uncond",), args, kwargs))
            return self._shown, 1
        return self._shown, 0

    def _batched(self, step: Step, network: Network, args: Any, kwargs: Any) -> tuple[Any, int]:
        assert self.style is not None
        batch, cond = batch_of(args, kwargs), self.style.order.index("cond")
        self._samples = self._samples or batch // 2
        if batch == self._samples and "uncond" not in step.branches:  # the pipeline stopped its guidance as well
            self._shown = network(("cond",), args, kwargs)
            self._outs = {"cond": output_of(self._shown)}
            return self._shown, 1
        if batch != 2 * self._samples:
            raise StateError(
                f"a guided row with a batch of {batch}; need cond and uncond, {2 * self._samples}. Guidance that a "
                "callback or an option of the call ends is the plan's to end: apply_guidance(plan, interval=...)"
            )
        if "uncond" in step.branches:
            result = network(self.style.order, args, kwargs)
            both = output_of(result).chunk(2)
            self._outs = {"cond": both[cond], "uncond": both[1 - cond]}
        else:
            result = network(("cond",), half(args, batch, cond), half(kwargs, batch, cond))
            self._outs = {"cond": output_of(result)}
        self._shown = with_output(result, twice(self._outs["cond"]))
        return self._shown, len(self._outs)

    # --- the step ---------------------------------------------------------------------------------------------------
    def advance(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any) -> Tensor:
        """The row's update; returns the latents for the pipeline, [n, ...] (or held twice, as the pipeline does)."""
        doubled = self.guided and not self.silent and self.style is not None and self.style.doubled
        planned = self._row(timestep)
        row = self.adaptive.row(self._numbers[self._at], planned)
        unscaled = self._unscaled if self.style is not None and self.style.rescaled else None
        x = sample if unscaled is None else unscaled
        if doubled:
            x = x.chunk(2)[0]
        self._set_draw(model_output, sample, generator, x.shape[0])
        self._state(x, doubled, model_output.dtype)
        assert self._stepper is not None
        outs = (model_output,) if self.silent else self._predictions(row, model_output, x)
        number, caches = self._at - self._base, self.caches
        if not self.silent:
            made = dict(zip(row.branches, outs, strict=True))
            self.adaptive.note(made)
            outs = tuple(made.get(branch, made["cond"]) for branch in planned.branches)  # a guard may leave some out
        result = self._stepper.advance(outs, None if caches is None else caches.advanced(number, outs))
        self.given.append(Given() if caches is None else caches.given(number))
        self._at += 1
        if self._stepper.done:
            self._spend()
        self._outs, self._calls = {}, 0
        if doubled:
            return twice(result)
        self._returned, self._version = result, version_of(result)
        return result

    def _state(self, x: Tensor, doubled: bool, output: torch.dtype) -> None:
        """The stepper stands where the pipeline stands; `output`: dtype of the predictions."""
        if self._stepper is None:
            self._stepper = self._started(x, output)
            return
        same = doubled or x is self._returned
        if self.changed or (same and not doubled and version_of(x) != self._version):
            if self._at % self.order == 0:
                self._restart()
                self._stepper = self._started(x, output)
            else:
                self._stepper.put(x)
            self.changed = False
        elif not same:
            self._stepper.put(x)

    def _restart(self) -> None:
        """The run starts anew with the latents that a callback left: nothing of before is kept or read."""
        self.begin(self._at)
        self._stepper, self.changed = None, False
        self.restarts += 1

    def _tail(self, evaluation: int) -> tuple[Plan, dict[Any, Any]]:
        """The plan from an evaluation on, and its lowered tables."""
        tails = self._memo.tails
        if evaluation not in tails:
            tails[evaluation] = self._plan_from(evaluation), {}
        return tails[evaluation]

    def _plan_from(self, evaluation: int) -> Plan:
        """The plan's tail from an evaluation on: multistep history starts anew."""
        if evaluation == 0:
            return self.plan
        if self.plan.recipe is None:
            raise StateError(
                f"evaluation {evaluation}: the run (re)starts here, and the plan has no recipe to plan its tail; use a "
                "plan of make_plan or Plan.from_diffusers"
            )
        left = self.steps - evaluation // self.order
        tail = replan(self.plan.recipe, tail=min(1.0, (left + 0.5) / self.steps))
        rest = self._rows[evaluation:]
        if [step.timestep for step in _evaluated(tail)] == [step.timestep for step in rest]:
            return tail
        # A scheduler with a grid of its own for such runs, while the pipeline keeps the rows of the full one.
        first = [i for i, step in enumerate(self.plan.steps) if step.variant is not None][evaluation]
        start = Affine("x", (("input:start", 1.0),))
        return verify(replace(self.plan, steps=self.plan.steps[first:], init=(start,)))

    def _started(self, x: Tensor, output: torch.dtype) -> Stepper:
        plan, lowered = self._tail(self._base)
        shape = tuple(x.shape[1:])
        if plan.binding is not None and plan.binding.latent_shape != shape:
            raise ShapeError(f"the plan is bound to latents {plan.binding.latent_shape}, the call has {shape}")
        wide = torch.float64 in (x.dtype, output)
        state = torch.float64 if wide else torch.float32
        patch = () if self.caches is None or self.caches.tokens is None else self.caches.layout(shape).by_element
        stepper = Stepper(plan, x, self.values, lambda: self._draw(), state, lowered, patch)
        stepper.start(x)
        return stepper

    def _predictions(self, row: Step, model_output: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The row's branches as its ops read them: what the pipeline does to a prediction done to each branch."""
        assert self.style is not None
        if "cond" not in self._outs or len(self._outs) < len(row.branches):
            raise StateError(f"step: the network ran {sorted(self._outs) or 'nothing'}; the row needs {row.branches}")
        channels = x.shape[1]
        outs = [self._outs[branch][:, :channels] for branch in row.branches]  # without learned variances
        outs = [out if self.style.sign == 1.0 else out * self.style.sign for out in outs]
        if not self._memo.trusted:  # once a plan: it reads the device
            handed = model_output[: x.shape[0], :channels]
            mine = outs[0].to(handed.dtype)
            if mine.shape != handed.shape or not torch.allclose(
                handed, mine, rtol=1e-2, atol=1e-3 * float(mine.abs().max())
            ):
                raise UnsupportedError(
                    "the pipeline changes predictions between network and scheduler in a way that is not known; use a "
                    "plan without guidance (the pipeline's own then applies)"
                )
            self._memo.trusted = True
        return tuple(outs)

    def _set_draw(self, output: Tensor, sample: Tensor, generator: Any, n: int) -> None:
        """Draws as the pipeline's scheduler makes them: its generator, shape, device and dtype."""
        from diffusers.utils.torch_utils import randn_tensor

        def draw() -> Tensor:
            drawn = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=output.dtype)
            made: Tensor = drawn[:n]
            return made

        self._draw = draw

    def _spend(self) -> None:
        """The draw that the scheduler of the plan makes in its last step without using it."""
        recipe = self.plan.recipe
        if recipe is None or recipe.maker != "from_diffusers" or self._stepper is None:
            return
        name = recipe.arguments.to_dict()["scheduler"]["_class_name"]
        if name in _DRAW_TO_THE_END and self._stepper.draws and not self._stepper.drew_last:
            self._draw()

    # --- where the run stands ---------------------------------------------------------------------------------------
    def _row(self, timestep: Any = None) -> Step:
        """The row whose turn it is. Where a run starts is said by `begin`, else by the first timestep asked for."""
        if self._left is None:
            self.begin(0 if timestep is None else self._find(timestep))
        assert self._left is not None
        if self._at - self._base >= len(self._left):
            raise StateError(f"the plan has {len(self._left)} evaluations; the pipeline asks for one more")
        return self._left[self._at - self._base]

    def _find(self, timestep: Any) -> int:
        """First evaluation at a timestep, which is read from its device."""
        wanted = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        for i, step in enumerate(self._rows):
            if abs(step.timestep - wanted) <= 1e-4 * max(1.0, abs(wanted)):
                return i
        raise ArgumentError(f"timestep {wanted:g} is not one of the plan's: {[step.timestep for step in self._rows]}")
