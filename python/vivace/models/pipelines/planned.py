"""Which plan one call of a pipeline runs, and who does its arithmetic.

The given plan decides; the call may ask for another number of steps, explicit times, a strength. Where the result says
exactly what the pipeline's own scheduler does, that scheduler does it, so that the picture keeps its bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vivace.engine.diffusers_config import PREDICTION_TYPES
from vivace.engine.from_diffusers import plan_from_diffusers
from vivace.engine.merge_rows import merges
from vivace.engine.passes import apply_experts
from vivace.engine.plan import Plan, Recipe, Step
from vivace.engine.planning import apply_passes, replan
from vivace.engine.token_rows import tokens_of
from vivace.errors import ArgumentError, UnsupportedError
from vivace.models.pipelines.cached import gives_again
from vivace.models.pipelines.calls import CallStyle, runs_uncond

_EXTRAS = ("guidance_rescale", "use_dynamic_cfg", "pag_scale", "skip_guidance_layers")


@dataclass(frozen=True, slots=True)
class Arguments:
    """A call's arguments by name: `values` with the defaults filled in, `explicit` those the caller wrote."""

    values: Mapping[str, Any]
    explicit: frozenset[str]

    def said(self, name: str) -> Any:
        """The value of an argument that the caller wrote, else None."""
        return self.values[name] if name in self.explicit else None


@dataclass(slots=True)
class Memo:
    """What calls of one effective plan need not do again.

    tails: the plan from an evaluation on, with its lowered tables by the numbers of the call; trusted: how the
    pipeline treats predictions on their way to the scheduler was checked.
    """

    tails: dict[int, tuple[Plan, dict[Any, Any]]] = field(default_factory=dict)
    trusted: bool = False


@dataclass(frozen=True, slots=True)
class Effective:
    """What a call runs.

    plan, digest: of the full run, its tail not taken yet, and its hash; own: the pipeline's scheduler does the
    arithmetic; silent: the plan says nothing about guidance, so that the pipeline's own applies; reason: of `own`;
    warnings: options of the call without effect; memo: shared by the calls that run it.
    """

    plan: Plan
    digest: str
    own: bool
    silent: bool
    reason: str
    warnings: tuple[str, ...] = ()
    memo: Memo = field(default_factory=lambda: Memo(), compare=False, repr=False)


@dataclass(slots=True)
class Planner:
    """Makes the plan of a call; remembers the last ones, since calls repeat.

    plan: the given one; None: what the pipeline's scheduler does, call by call. own: leave the arithmetic of such a
    plan to that scheduler.
    """

    plan: Plan | None
    own: bool = True
    steps: int | None = field(init=False)
    _made: dict[Any, Effective] = field(default_factory=dict)

    kept = 32  # plans remembered

    def __post_init__(self) -> None:
        """`steps`: what the plan was made for, and `num_inference_steps` means; None without a plan."""
        if self.plan is None:
            self.steps = None
        elif self.plan.recipe is None:
            self.steps = self.plan.nfe
        else:
            self.steps = int(self.plan.recipe.arguments.to_dict()["steps"])

    @property
    def scale(self) -> float | None:
        """The plan's own guidance scale; None for a plan without guidance."""
        inputs = () if self.plan is None else self.plan.inputs
        return next((ref.default for ref in inputs if ref.name == "guidance_scale"), None)

    @property
    def silent(self) -> bool:
        """The plan says nothing about guidance: no pass of it, no row of several branches."""
        if self.plan is None:
            return True
        passes = () if self.plan.recipe is None else self.plan.recipe.passes
        several = any(len(variant.branches) > 1 for variant in self.plan.variants)
        return not several and all(name != "apply_guidance" for name, _ in passes)

    def check_scheduler(self, scheduler: Any) -> None:
        """Raise ArgumentError unless the plan is for what the pipeline's network predicts."""
        kind = type(scheduler).__name__
        named = "flow_prediction" if kind.startswith("FlowMatch") else scheduler.config.get("prediction_type")
        predicts = PREDICTION_TYPES.get(named)
        if self.plan is not None and predicts is not None and self.plan.prediction != predicts:
            raise ArgumentError(
                f"the plan is for prediction {self.plan.prediction!r}, the pipeline's {kind} for {predicts!r}; make "
                f"the plan with prediction={predicts!r}"
            )

    def check(self, pipeline: Any, call: Arguments, style: CallStyle | None) -> None:
        """Refuse a call this plan cannot run, before any work. Raises: ArgumentError."""
        if self.plan is None:
            return
        self.check_scheduler(pipeline.scheduler)
        if call.said("eta"):
            raise ArgumentError(f"eta={call.said('eta')}: the plan decides the noise of its rows; make it with eta=")
        if not self.silent and call.said("cfg_trunc_ratio") not in (None, 1.0):
            raise ArgumentError("cfg_trunc_ratio: the plan decides guidance; use apply_guidance(plan, interval=...)")
        wanted = call.said("num_inference_steps")
        if self.plan.recipe is None and wanted is not None and wanted != self.steps:
            raise ArgumentError(
                f"num_inference_steps={wanted}: the plan has {self.steps} rows and no recipe to plan it anew; pass "
                f"{self.steps}, or accelerate with a plan of make_plan or Plan.from_diffusers"
            )
        if self.plan.recipe is None and any(call.said(name) is not None for name in ("timesteps", "sigmas")):
            raise ArgumentError("timesteps, sigmas: the plan has no recipe to plan it anew; leave them out")
        if self.plan.recipe is None and float(call.values.get("strength") or 1.0) < 1.0:
            raise ArgumentError("strength: the plan has no recipe to plan its tail; use make_plan or from_diffusers")
        if self.silent or style is None:
            return
        guided = [i for i, step in enumerate(self.plan.steps) if "uncond" in step.branches]
        if guided and not runs_uncond(pipeline, style, call.values):
            given = f"{style.scale}={call.values.get(style.scale)}"
            needs = f" and {' or '.join(style.needs)}" if any(style.needs) else ""
            raise ArgumentError(
                f"rows {guided[0]}..{guided[-1]} of the plan evaluate cond and uncond, but this call ({given}) has no "
                f"unconditional branch; pass {style.scale} > 1{needs}, or accelerate with a plan without guidance"
            )

    def effective(
        self, pipeline: Any, scheduler: Any, call: Arguments, style: CallStyle | None, given: Mapping[str, Any]
    ) -> Effective:
        """The plan of a call. `given`: what the pipeline hands its scheduler: steps, timesteps, sigmas, mu.

        Raises: ArgumentError, PlanError, UnsupportedError.
        """
        asked = {name: call.said(name) for name in (*_EXTRAS, "timesteps", "sigmas")}
        tables = [getattr(scheduler, name, None) for name in ("shift", "alphas_cumprod")]
        state = (type(scheduler).__name__, scheduler.config, tables)
        key = _frozen((*state, given, asked))
        if key not in self._made:
            if len(self._made) >= self.kept:
                self._made.pop(next(iter(self._made)))
            self._made[key] = self._effective(pipeline, scheduler, call, style, given)
        return self._made[key]

    def _effective(
        self, pipeline: Any, scheduler: Any, call: Arguments, style: CallStyle | None, given: Mapping[str, Any]
    ) -> Effective:
        try:
            own = plan_from_diffusers(scheduler, **given)
            why = "the plan differs from what the pipeline's scheduler does"
        except UnsupportedError as error:
            own, why = None, str(error)
        plan = self._planned(scheduler, call, own, why, given)
        boundary = expert_boundary(pipeline)
        if boundary is not None and not self.silent and len({v.model for v in plan.variants}) == 1:
            plan = apply_experts(plan, below=boundary)
        warnings = []
        if not self.silent:
            warnings += [
                f"{name} had no effect: the plan decides guidance; use passes.apply_guidance"
                for name in _EXTRAS
                if call.said(name)
            ]
        other = self._other_than(own, plan, style) if own is not None else why
        if other is None and not warnings:
            return Effective(plan, plan.hash, True, self.silent, "the plan is what the pipeline's scheduler does")
        return Effective(plan, plan.hash, False, self.silent, other or warnings[0], tuple(warnings))

    def _other_than(self, own: Plan, plan: Plan, style: CallStyle | None) -> str | None:
        """Why the pipeline and its scheduler do not compute exactly what `plan` says; None when they do."""
        if not self.own:
            return "asked for by arithmetic='plan'"
        if merges(plan):
            return "the plan merges tokens"
        if tokens_of(plan):
            return "some rows of the plan compute some image tokens"
        if any(step.guard is not None for step in plan.steps):
            return "guards of the plan decide what its rows run"
        if gives_again(plan):
            return "the plan gives kept values again"
        if plan.recipe is None or _rows(plan) != _rows(apply_passes(replace(own, recipe=_bare(own)), plan.recipe)):
            return "the plan differs from what the pipeline's scheduler does"
        if self.silent:
            return None
        if style is None or not style.plain:
            return "the pipeline's own guidance is more than uncond + scale * (cond - uncond)"
        if any(args.to_dict().get("rescale") for name, args in plan.recipe.passes if name == "apply_guidance"):
            return "the plan rescales guidance"
        guided = all(len(step.branches) == 2 for step in plan.steps if step.variant is not None)
        return None if guided else "some rows of the plan are guided, some are not"

    def _planned(self, scheduler: Any, call: Arguments, own: Plan | None, why: str, given: Mapping[str, Any]) -> Plan:
        """The given plan at the call's steps and times."""
        if self.plan is None:
            if own is None:
                raise UnsupportedError(why)
            return own
        recipe = self.plan.recipe
        if recipe is None:
            return self.plan
        arguments = recipe.arguments.to_dict()
        if own is not None and recipe.maker == "from_diffusers" and _same_scheduler(recipe, own.recipe):
            if not any(name in arguments for name in ("timesteps", "sigmas")):
                mu = arguments.get("mu", given["mu"])
                own = own if mu == given["mu"] else plan_from_diffusers(scheduler, **{**given, "mu": mu})
                return apply_passes(own, recipe)
        changes: dict[str, Any] = {}
        if given["steps"] != self.steps:
            changes["steps"] = given["steps"]
        for name in ("timesteps", "sigmas"):
            if call.said(name) is not None:
                values = [float(value) for value in call.said(name)][: given["steps"]]  # some end with the last level
                changes |= {name: values, "steps": given["steps"], "grid": None}
        if recipe.maker == "from_diffusers":
            changes.pop("grid", None)
            if given.get("mu") is not None and arguments["scheduler"].get("use_dynamic_shifting"):
                changes["mu"] = given["mu"]
        return replan(recipe, **changes) if changes else self.plan


def expert_boundary(pipeline: Any) -> float | None:
    """The timestep below which a pipeline of two experts runs its second one; None for other pipelines."""
    ratio = pipeline.config.get("boundary_ratio")
    if ratio is None or any(getattr(pipeline, name, None) is None for name in ("transformer", "transformer_2")):
        return None
    return float(ratio) * float(pipeline.scheduler.config.num_train_timesteps)


def _rows(plan: Plan) -> list[Step]:
    """The rows, names of models aside: the pipeline picks its expert as the plan does."""
    return [
        replace(step, variant=None if step.variant is None else replace(step.variant, model="main"))
        for step in plan.steps
    ]


def _bare(plan: Plan) -> Recipe | None:
    return None if plan.recipe is None else replace(plan.recipe, passes=())


def _same_scheduler(recipe: Recipe, own: Recipe | None) -> bool:
    """Both were made from one scheduler: same class, fields, table and shift."""
    if own is None:
        return False
    mine, theirs = recipe.arguments.to_dict(), own.arguments.to_dict()
    return all(mine.get(name) == theirs.get(name) for name in ("scheduler", "table", "shift"))


def _frozen(value: Any) -> Any:
    """A hashable form of configurations and arguments, tensors by content."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.detach().cpu().double().numpy().tobytes()
    if isinstance(value, Mapping):
        return tuple(sorted((str(name), _frozen(item)) for name, item in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if hasattr(value, "tolist"):
        return _frozen(value.tolist())
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
