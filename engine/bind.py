"""Unbound -> bound: block ranges and token shares of a plan resolved for one model and one latent shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from vivace.engine.plan import Binding, Plan, Rule, Variant
from vivace.engine.verify import check_conflicts, said, verify
from vivace.errors import PlanError, ShapeError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a plan may know of a model.

    fingerprint: hash of weights and configuration; prediction: "eps" | "x0" | "v" | "flow"; latent_shape: default
    (C, H, W) or any rank; blocks: number of transformer or UNet blocks; patch: edge of a token in latent elements, one
    per spatial axis; token_group: `keep` is a multiple of it; branches the model can run; conditioning: what a prompt
    is ("class", "text", "none"); schedule: its `NoiseSchedule`.
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

    def tokens(self, shape: tuple[int, ...] | None = None) -> int:
        """Image tokens of a latent of `shape` (C, spatial...). Raises ShapeError when patches do not divide it."""
        shape = self.latent_shape if shape is None else shape
        spatial = shape[1:]
        if len(shape) != len(self.latent_shape) or shape[0] != self.latent_shape[0] or min(shape) < 1:
            raise ShapeError(f"model {self.name!r}: latent shape {shape}; need one like {self.latent_shape}")
        if any(size % edge for size, edge in zip(spatial, self.patch, strict=True)):
            raise ShapeError(f"model {self.name!r}: latent shape {shape} is not a multiple of the patch {self.patch}")
        return prod(size // edge for size, edge in zip(spatial, self.patch, strict=True))


def bind_plan(plan: Plan, spec: ModelSpec, shape: tuple[int, ...] | None = None) -> Plan:
    """Resolve `plan` for `spec` at latent `shape` (default: the model's) and verify the result."""
    shape = spec.latent_shape if shape is None else tuple(shape)
    tokens = spec.tokens(shape)
    binding = Binding(spec.fingerprint, spec.blocks, tokens, spec.token_group, shape)
    if plan.binding is not None:
        if plan.binding != binding:
            raise PlanError(f"bind: the plan is bound to {plan.binding}, asked for {binding}; bind the unbound plan")
        return plan
    if plan.prediction != spec.prediction:
        raise PlanError(
            f"bind: the plan is for prediction {plan.prediction!r}, model {spec.name!r} predicts {spec.prediction!r}; "
            "make the plan with the model's prediction"
        )
    for info in plan.tensors:
        if info.shape != shape:
            raise PlanError(f"bind: side-car tensor {info.key!r} has shape {info.shape}, the latent {shape}")
    steps = []
    for i, step in enumerate(plan.steps):
        variant = None if step.variant is None else _bind_variant(f"step {i}", step.variant, spec, tokens)
        guard = step.guard
        if guard is not None:
            guard = replace(guard, otherwise=_bind_variant(f"step {i} guard", guard.otherwise, spec, tokens))
        steps.append(replace(step, variant=variant, guard=guard))
    return verify(replace(plan, steps=tuple(steps), binding=binding))


def _bind_variant(where: str, variant: Variant, spec: ModelSpec, tokens: int) -> Variant:
    missing = set(variant.branches) - set(spec.branches)
    if missing:
        raise PlanError(f"{where}: branches {sorted(missing)} are not offered by model {spec.name!r} {spec.branches}")
    group = spec.token_group
    keep = min(tokens, max(group, round(variant.keep * tokens / group) * group))
    rules = tuple(replace(rule, blocks=_absolute(where, rule, spec.blocks)) for rule in variant.rules)
    check_conflicts(where, replace(variant, rules=rules))
    return replace(variant, keep=float(keep), rules=normal_form(rules, variant.branches))


def _absolute(where: str, rule: Rule, blocks: int) -> tuple[int, int]:
    first, last = rule.blocks
    if first < 0:
        first, last = first + blocks, last or blocks
    if last < 0:
        last += blocks
    if not 0 <= first < last <= blocks:
        raise PlanError(f"{where}: rule on blocks {rule.blocks} is empty or outside a model of {blocks} blocks")
    return first, last


def normal_form(rules: tuple[Rule, ...], branches: tuple[str, ...]) -> tuple[Rule, ...]:
    """The one way to write `rules`: per site and run of equal blocks one rule, branches merged, sorted."""
    cells: dict[tuple[str, str, int], dict[str, Any]] = {}
    for rule in rules:
        for branch in rule.branches or branches:
            for block in range(*rule.blocks):
                cells.setdefault((rule.site, branch, block), {}).update(said(rule))
    runs: dict[tuple[str, tuple[int, int], tuple[tuple[str, Any], ...]], set[str]] = {}
    for site, branch in sorted({key[:2] for key in cells}):
        start = 0
        blocks = sorted(block for s, b, block in cells if (s, b) == (site, branch))
        for n, block in enumerate(blocks):
            fields = cells[site, branch, block]
            end = n + 1 == len(blocks) or blocks[n + 1] != block + 1 or cells[site, branch, block + 1] != fields
            if end and fields:
                runs.setdefault((site, (blocks[start], block + 1), tuple(sorted(fields.items()))), set()).add(branch)
            start = n + 1 if end else start
    out = []
    for (site, span, fields_key), owners in runs.items():
        listed = None if owners == set(branches) else tuple(b for b in branches if b in owners)
        out.append(Rule(span, site, listed, **dict(fields_key)))
    return tuple(sorted(out, key=lambda rule: (rule.blocks, rule.site, rule.branches or ())))
