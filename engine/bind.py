"""Unbound -> bound: block ranges and token shares of a plan resolved for one model and one latent shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from vivace.engine.low_rank import shapes_of
from vivace.engine.plan import Args, Binding, Plan, Rule, Variant
from vivace.engine.token_layout import Layout
from vivace.engine.verify import check_conflicts, said, verify
from vivace.engine.verify_caches import MAX_CELLS
from vivace.errors import ModelError, PlanError, ShapeError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a plan may know of a model.

    fingerprint: hash of weights and configuration; prediction: "eps" | "x0" | "v" | "flow"; latent_shape: default
    (C, H, W) or any rank; blocks: number of transformer or UNet blocks; patch: edge of a token in latent elements, one
    per spatial axis; token_group: `keep` is a multiple of it; branches the model can run; conditioning: what a prompt
    is ("class", "text", "none"); schedule: its `NoiseSchedule`; width: of a token's hidden state in blocks, 0 where
    blocks differ; costs: of one block's sites and of what is outside of blocks ("outside"), in any unit; layers: of all
    blocks of a UNet together, 0 where they are not told apart.
    """

    name: str
    fingerprint: str
    prediction: str
    latent_shape: tuple[int, ...]
    blocks: int
    patch: tuple[int, ...]
    token_group: int = 1
    branches: tuple[str, ...] = ("cond", "uncond")
    conditioning: str = "none"
    schedule: Any = None
    width: int = 0
    costs: tuple[tuple[str, float], ...] = ()
    layers: int = 0

    def tokens(self, shape: tuple[int, ...] | None = None) -> int:
        """Image tokens of a latent of `shape` (C, spatial...). Raises ShapeError when patches do not divide it."""
        shape = self.latent_shape if shape is None else shape
        spatial = shape[1:]
        if len(shape) != len(self.latent_shape) or shape[0] != self.latent_shape[0] or min(shape) < 1:
            raise ShapeError(f"model {self.name!r}: latent shape {shape}; need one like {self.latent_shape}")
        if any(size % edge for size, edge in zip(spatial, self.patch, strict=True)):
            raise ShapeError(f"model {self.name!r}: latent shape {shape} is not a multiple of the patch {self.patch}")
        return prod(size // edge for size, edge in zip(spatial, self.patch, strict=True))

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Where the image tokens of a latent of `shape` lie."""
        return Layout(shape, (shape[0], *self.patch))


def bind_plan(plan: Plan, spec: ModelSpec, shape: tuple[int, ...] | None = None) -> Plan:
    """Resolve `plan` for `spec` at latent `shape` (default: the model's) and verify the result."""
    shape = spec.latent_shape if shape is None else tuple(shape)
    tokens = spec.tokens(shape)
    binding = Binding(spec.fingerprint, spec.blocks, tokens, spec.token_group, shape, spec.width, spec.layers)
    if plan.binding is not None:
        if replace(plan.binding, width=binding.width, layers=binding.layers) != binding:
            raise PlanError(f"bind: the plan is bound to {plan.binding}, asked for {binding}; bind the unbound plan")
        return plan
    if plan.prediction != spec.prediction:
        raise PlanError(
            f"bind: the plan is for prediction {plan.prediction!r}, model {spec.name!r} predicts {spec.prediction!r}; "
            "make the plan with the model's prediction"
        )
    _check_recipe(plan, binding)
    mapped = shapes_of(plan, shape)
    for info in plan.tensors:
        if info.shape != mapped.get(info.key, shape):
            raise PlanError(f"bind: side-car tensor {info.key!r} has shape {info.shape}, the latent {shape}")
    bound: dict[Variant, Variant] = {}  # rows mostly share a few
    cells = 0
    for i, step in enumerate(plan.steps):
        wanted = {f"step {i}": step.variant, f"step {i} guard": None if step.guard is None else step.guard.otherwise}
        for where, variant in wanted.items():
            if variant is not None and variant not in bound:
                rules = tuple(replace(rule, blocks=_absolute(where, rule, spec)) for rule in variant.rules)
                cells += sum((r.blocks[1] - r.blocks[0]) * len(r.branches or variant.branches) for r in rules)
                if cells > MAX_CELLS:
                    raise PlanError(f"{where}: rules name more than {MAX_CELLS} blocks up to here; use fewer variants")
                bound[variant] = _bind_variant(where, replace(variant, rules=rules), spec, tokens)
    steps = tuple(
        replace(
            step,
            variant=None if step.variant is None else bound[step.variant],
            guard=None if step.guard is None else replace(step.guard, otherwise=bound[step.guard.otherwise]),
        )
        for step in plan.steps
    )
    return verify(replace(plan, steps=steps, binding=binding))


def check_origin(what: str, measured: Mapping[str, Any], binding: Binding) -> None:
    """Raise ModelError unless `binding` is the model and shape that something was measured on.

    measured: "fingerprint", and "latent_shape" where it is known.
    """
    fingerprint, shape = measured.get("fingerprint"), measured.get("latent_shape") or []
    if fingerprint != binding.fingerprint:
        raise ModelError(
            f"{what}: measured on model {str(fingerprint)[:12]}, this one is {binding.fingerprint[:12]} (other "
            "weights, or a LoRA was added or fused since); calibrate this model"
        )
    own = list(binding.latent_shape)
    if shape and (list(shape) if isinstance(shape, (list, tuple)) else shape) != own:
        raise ModelError(f"{what}: measured at latent shape {shape}, this run has {own}; calibrate at this shape")


def _check_recipe(plan: Plan, binding: Binding) -> None:
    """Solvers and passes that a calibration table was read for fit the model it was made of only. Raises ModelError."""
    if plan.recipe is None:
        return
    for name, args in ((plan.recipe.maker, plan.recipe.arguments), *plan.recipe.passes):
        values = dict(args.items)
        for measured in (values.get("measured"), values.get("table")):
            if isinstance(measured, Args) and (measured is values.get("measured") or "sha256" in dict(measured.items)):
                check_origin(str(values.get("solver", name)), measured.to_dict(), binding)


def _bind_variant(where: str, variant: Variant, spec: ModelSpec, tokens: int) -> Variant:
    """`variant`, whose ranges are absolute already, with a token count and rules in normal form."""
    missing = set(variant.branches) - {*spec.branches, "perturbed"}  # which is cond, computed otherwise
    if missing:
        raise PlanError(f"{where}: branches {sorted(missing)} are not offered by model {spec.name!r} {spec.branches}")
    keep = token_count(variant.keep, tokens, spec.token_group)
    check_conflicts(where, variant)
    return replace(variant, keep=float(keep), rules=normal_form(variant.rules, variant.branches))


def token_count(share: float, tokens: int, group: int) -> int:
    """A share of the tokens as a count: the nearest multiple of the group, one group at least."""
    return tokens if share == 1.0 else min(tokens, max(group, round(share * tokens / group) * group))


def _absolute(where: str, rule: Rule, spec: ModelSpec) -> tuple[int, int]:
    (first, last), layers = rule.blocks, rule.site == "layer"
    blocks = spec.layers if layers else spec.blocks
    if layers and not blocks:
        raise PlanError(f"{where}: rule on site 'layer'; blocks of model {spec.name!r} have no layers told apart")
    if first < 0:
        first += blocks
    if last <= 0:
        last += blocks
    if not 0 <= first < last <= blocks:
        what = "layers" if layers else "blocks"
        raise PlanError(f"{where}: rule on {what} {rule.blocks} is empty or outside a model of {blocks} {what}")
    return first, last


def normal_form(rules: tuple[Rule, ...], branches: tuple[str, ...]) -> tuple[Rule, ...]:
    """The one way to write `rules`: per site and run of equal blocks one rule, branches merged, sorted."""
    claims: dict[tuple[str, str], list[tuple[tuple[int, int], dict[str, Any]]]] = {}
    for rule in rules:
        for branch in rule.branches or branches:
            claims.setdefault((rule.site, branch), []).append((rule.blocks, said(rule)))
    runs: dict[tuple[str, tuple[int, int], tuple[tuple[str, Any], ...]], set[str]] = {}
    for (site, branch), claimed in claims.items():
        for span, fields in _merged(claimed):
            runs.setdefault((site, span, fields), set()).add(branch)
    out = []
    for (site, span, fields), owners in runs.items():
        listed = None if owners == set(branches) else tuple(b for b in branches if b in owners)
        out.append(Rule(span, site, listed, **dict(fields)))
    return tuple(sorted(out, key=lambda rule: (rule.blocks, rule.site, rule.branches or ())))


def _merged(claimed: list[tuple[tuple[int, int], dict[str, Any]]]) -> list[tuple[tuple[int, int], tuple[Any, ...]]]:
    """Longest runs of blocks of which the same is said, in order; blocks of which nothing is said are left out."""
    cells: dict[int, dict[str, Any]] = {}
    for span, fields in claimed:
        for block in range(*span):
            cells.setdefault(block, {}).update(fields)
    runs: list[tuple[tuple[int, int], tuple[Any, ...]]] = []
    for block in sorted(cells):
        said_of = tuple(sorted(cells[block].items()))
        if runs and runs[-1] == ((runs[-1][0][0], block), said_of):
            runs[-1] = ((runs[-1][0][0], block + 1), said_of)
        elif said_of:
            runs.append(((block, block + 1), said_of))
    return runs
