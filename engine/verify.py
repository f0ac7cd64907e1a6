"""Legality of a plan. Run after every maker, pass, load and bind; nothing after it re-checks.

Each rule is one small function that raises `PlanError` with the row, what it got, what it needs and what to do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import combinations

from vivace.engine.plan import (
    BRANCHES,
    PRECISIONS,
    PREDICTIONS,
    SITES,
    Action,
    Affine,
    AgeRef,
    Coef,
    InputRef,
    Op,
    Plan,
    Rule,
    Step,
    TensorRef,
    Transform,
    Variant,
    coefs,
    reads,
    writes,
)
from vivace.errors import PlanError

SLOT = re.compile(r"[a-z][a-z0-9_]*\Z")
RESERVED = re.compile(r"(noise:(0|[1-9][0-9]*)|one|input:[a-z][a-z0-9_]*)\Z")
STORES = ("fp32", "bf16", "fp16", "fp8", "int8")
# Required and optional parameters, and how many slots are read besides the one changed.
TRANSFORMS: dict[str, tuple[tuple[str, ...], int]] = {
    "clamp": (("low", "high"), 0),
    "dynamic_threshold": (("ratio", "max"), 0),
    "cfg_rescale": (("phi",), 1),
}
_LEVEL_SLACK = 1e-9  # radians of atan2(sigma, alpha): two roundings of one level are not a rise


def verify(plan: Plan) -> Plan:
    """Return `plan` unchanged if every rule holds. Raises PlanError naming the row and the rule."""
    if plan.prediction not in PREDICTIONS:
        raise PlanError(f"plan: prediction {plan.prediction!r} is unknown; use one of {', '.join(PREDICTIONS)}")
    if not plan.steps:
        raise PlanError("plan: it has no rows; a plan needs at least one")
    keys = [info.key for info in plan.tensors]
    if len(set(keys)) != len(keys):
        raise PlanError(f"plan: two side-car tensors share a key in {keys}")
    walk = _Walk(plan)
    for op in plan.init:
        if not isinstance(op, Affine):
            raise PlanError("init: only Affine ops may fill the first slots")
        walk.op("init", -1, op)
    for i, step in enumerate(plan.steps):
        walk.row(i, step)
    if "x" not in walk.live:
        raise PlanError(f"plan: no row writes slot 'x', which holds the result (live: {walk.names()})")
    return plan


class _Walk:
    """State of the walk from the first row to the last: which slots are filled, what the caches hold."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.live: dict[str, int] = {}  # slot -> row that wrote it (-1: init)
        self.raw: dict[str, int] = {}  # slot that holds a raw network output -> row of its evaluation
        self.kept: dict[tuple[str, object, str, str], int] = {}  # (model, block, site, branch) -> values kept
        self.level = math.inf
        self.evaluated = False

    def names(self) -> str:
        return ", ".join(sorted(self.live)) or "none"

    def row(self, i: int, step: Step) -> None:
        where = f"step {i}"
        self._numbers(where, step)
        level = math.atan2(step.sigma, step.alpha)
        if level > self.level + _LEVEL_SLACK and not step.restart:
            raise PlanError(
                f"{where}: noise level rises from the row before (sigma {step.sigma:.6g}, alpha {step.alpha:.6g}); "
                "rows go from noise to data, or mark the row restart=True"
            )
        self.level = level
        if step.variant is not None:
            self._evaluation(where, i, step, step.variant)
        elif step.guard is not None:
            raise PlanError(f"{where}: a guard on a row without evaluation has nothing to choose")
        for op in step.ops:
            self.op(where, i, op)

    def _numbers(self, where: str, step: Step) -> None:
        for name in ("timestep", "alpha", "sigma", "x_scale"):
            _finite(where, name, getattr(step, name))
        if step.alpha < 0 or step.sigma < 0 or step.alpha == step.sigma == 0:
            raise PlanError(f"{where}: level alpha={step.alpha}, sigma={step.sigma}: both >= 0 and not both 0 needed")
        for weight in step.forecast:
            _finite(where, "forecast weight", weight)
        for name, coef in step.net_inputs:
            self._coef(where, f"net input {name!r}", coef)

    def _evaluation(self, where: str, i: int, step: Step, variant: Variant) -> None:
        if step.x not in self.live:
            raise PlanError(f"{where}: the network reads empty slot {step.x!r} (live: {self.names()})")
        self._variant(where, variant, step)
        if len(step.outs) != len(variant.branches) or len(set(step.outs)) != len(step.outs):
            raise PlanError(
                f"{where}: outs {step.outs} for branches {variant.branches}; one slot per branch, all different"
            )
        if step.guard is not None:
            _finite(where, "guard threshold", step.guard.threshold)
            if step.guard.rule not in ("below", "above", "accumulated_below"):
                raise PlanError(f"{where}: guard rule {step.guard.rule!r}; use below, above or accumulated_below")
            self._variant(f"{where} guard", step.guard.otherwise, step)
            extra = set(step.guard.otherwise.branches) - set(variant.branches)
            if extra:
                raise PlanError(
                    f"{where}: guard runs branches {sorted(extra)} for which the row has no out slot; "
                    "both variants must agree on slots"
                )
        self._keep(variant)
        self.evaluated = True
        for out in step.outs:
            _slot_name(where, out)
            self.live[out] = self.raw[out] = i

    def _variant(self, where: str, variant: Variant, step: Step) -> None:
        branches = variant.branches
        if "cond" not in branches or len(set(branches)) != len(branches) or set(branches) - set(BRANCHES):
            raise PlanError(f"{where}: branches {branches}; need 'cond' and others of {BRANCHES}, each once")
        _finite(where, "keep", variant.keep)
        binding = self.plan.binding
        tokens = 1 if binding is None else binding.tokens
        if not 0 < variant.keep <= tokens:
            raise PlanError(f"{where}: keep {variant.keep}; need 0 < keep <= {tokens}")
        if binding is not None and variant.keep % binding.token_group:
            raise PlanError(f"{where}: keep {variant.keep:g}; need a multiple of the token group {binding.token_group}")
        for rule in variant.rules:
            _rule(where, rule, None if binding is None else binding.blocks, branches)
        check_conflicts(where, variant)
        for rule in variant.rules:
            self._cached(where, variant, rule, step)
        if not self.evaluated and variant.keep != tokens:
            raise PlanError(f"{where}: the first evaluated row must be full; keep is {variant.keep:g} of {tokens}")

    def _cached(self, where: str, variant: Variant, rule: Rule, step: Step) -> None:
        if rule.action not in (Action.REUSE, Action.FORECAST):
            return
        name = Action(rule.action).name
        if not self.evaluated:
            raise PlanError(f"{where}: {name} of blocks {rule.blocks} in the first evaluated row; it must be full")
        need = rule.order + 1 if rule.action == Action.FORECAST else 1
        for key in _cells(variant, rule):
            have = self.kept.get(key, 0)
            if have < need:
                raise PlanError(
                    f"{where}: {name} of block {key[1]} site {rule.site!r} branch {key[3]!r} needs {need} kept "
                    f"value(s), has {have}; put a COMPUTE rule with order >= {need - 1} in earlier rows of model "
                    f"{variant.model!r}"
                )
        if rule.action == Action.FORECAST and len(step.forecast) < need:
            raise PlanError(f"{where}: FORECAST of order {rule.order} needs {need} weights, got {len(step.forecast)}")

    def _keep(self, variant: Variant) -> None:
        for rule in variant.rules:
            if rule.action == Action.COMPUTE:
                for key in _cells(variant, rule):
                    self.kept[key] = min(self.kept.get(key, 0), rule.order) + 1

    def op(self, where: str, i: int, op: Op) -> None:
        dst = writes(op)
        _slot_name(where, dst)
        for slot in reads(op):
            if slot not in self.live and not RESERVED.match(slot):
                hint = "; order 2 and more need earlier evaluations" if slot[:1] == "m" and slot[1:].isdigit() else ""
                raise PlanError(f"{where}: update of {dst!r} reads empty slot {slot!r} (live: {self.names()}){hint}")
            if i < 0 and slot.startswith("noise:") and slot != "noise:0":
                raise PlanError(f"init: reads {slot!r}; the start is drawn from 'noise:0'")
        if isinstance(op, Affine):
            self._affine(where, i, op)
        else:
            _transform(where, op)
        for coef in coefs(op):
            self._coef(where, f"update of {dst!r}", coef)
        self.live[dst] = i
        if isinstance(op, Affine):
            self.raw.pop(dst, None)

    def _affine(self, where: str, i: int, op: Affine) -> None:
        if not op.terms:
            raise PlanError(f"{where}: update of {op.dst!r} has no terms")
        stamp = i if op.at is None else op.at
        if op.at is not None and not 0 <= op.at <= i:
            raise PlanError(f"{where}: update of {op.dst!r} is stamped row {op.at}; rows 0 to {i} are known here")
        for slot, _ in op.terms:
            if slot in self.raw and self.raw[slot] != stamp:
                raise PlanError(
                    f"{where}: update of {op.dst!r} is stamped row {stamp} but reads {slot!r}, an output of row "
                    f"{self.raw[slot]}; convert it in its own row or set at={self.raw[slot]}"
                )

    def _coef(self, where: str, what: str, coef: Coef) -> None:
        if isinstance(coef, TensorRef):
            if all(info.key != coef.key for info in self.plan.tensors):
                raise PlanError(f"{where}: {what} uses tensor {coef.key!r}, which the side-car lacks")
        elif isinstance(coef, InputRef):
            if not SLOT.match(coef.name):
                raise PlanError(f"{where}: {what} uses input {coef.name!r}; lower-case letters, digits and _ needed")
            if coef.default is not None:
                _finite(where, f"default of input {coef.name!r}", coef.default)
        elif isinstance(coef, AgeRef):
            if not coef.values:
                raise PlanError(f"{where}: {what} has an empty table of ages")
            for value in coef.values:
                _finite(where, what, value)
        else:
            _finite(where, what, coef)


def _finite(where: str, name: str, value: object) -> None:
    if not isinstance(value, float):
        raise PlanError(f"{where}: {name} is {type(value).__name__} {value!r}; a float is needed")
    if not math.isfinite(value):
        raise PlanError(f"{where}: {name} is {value}; a finite number is needed")


def _slot_name(where: str, slot: str) -> None:
    if RESERVED.match(slot):
        raise PlanError(f"{where}: slot {slot!r} is reserved and read-only; write another one")
    if not SLOT.match(slot):
        raise PlanError(f"{where}: slot name {slot!r}; lower-case letters, digits and _ needed")


def _transform(where: str, op: Transform) -> None:
    if op.kind not in TRANSFORMS:
        raise PlanError(f"{where}: transform {op.kind!r} is unknown; use one of {', '.join(TRANSFORMS)}")
    names, extra = TRANSFORMS[op.kind]
    if tuple(name for name, _ in op.params) != names or len(op.reads) != extra:
        raise PlanError(f"{where}: {op.kind} takes parameters {names} and {extra} more slot(s) read, got {op}")


def _rule(where: str, rule: Rule, blocks: int | None, branches: tuple[str, ...]) -> None:
    first, last = rule.blocks
    if blocks is not None and not 0 <= first < last <= blocks:
        raise PlanError(f"{where}: rule on blocks {rule.blocks}; need 0 <= first < last <= {blocks} (half-open)")
    same_end = (last > 0) if first >= 0 else (last <= 0)  # otherwise the model's size decides, at binding
    if same_end and first >= last:
        raise PlanError(f"{where}: rule on blocks {rule.blocks}; need first < last (half-open, negative: from the end)")
    if rule.site not in SITES:
        raise PlanError(f"{where}: rule on site {rule.site!r}; use one of {', '.join(SITES)}")
    if rule.branches is not None and (not rule.branches or set(rule.branches) - set(branches)):
        raise PlanError(f"{where}: rule on branches {rule.branches}; the row runs {branches}")
    if rule.order < 0 or (rule.order and rule.action not in (Action.COMPUTE, Action.FORECAST)):
        raise PlanError(f"{where}: rule order {rule.order} goes with COMPUTE or FORECAST and is >= 0")
    if rule.precision is not None and rule.precision not in PRECISIONS:
        raise PlanError(f"{where}: precision {rule.precision!r}; use one of {', '.join(PRECISIONS)}")
    if rule.store is not None and rule.store not in STORES:
        raise PlanError(f"{where}: store {rule.store!r}; use one of {', '.join(STORES)}")
    _finite(where, "share", rule.share)
    if not 0 < rule.share <= 1:
        raise PlanError(f"{where}: share {rule.share}; need 0 < share <= 1")


def _cells(variant: Variant, rule: Rule) -> Iterator[tuple[str, object, str, str]]:
    """(model, block, site, branch) cells of a rule; a range counted from the end stands for itself while unbound."""
    first, last = rule.blocks
    blocks: tuple[object, ...] = tuple(range(first, last)) if 0 <= first < last else (rule.blocks,)
    for branch in rule.branches or variant.branches:
        for block in blocks:
            yield variant.model, block, rule.site, branch


def said(rule: Rule) -> dict[str, object]:
    """Fields a rule gives a value to; the rest is left to other rules and to the model."""
    fields = {"action": rule.action, "store": rule.store, "precision": rule.precision}
    out: dict[str, object] = {name: value for name, value in fields.items() if value is not None}
    if rule.order:
        out["order"] = rule.order
    if rule.share != 1.0:
        out["share"] = rule.share
    return out


def check_conflicts(where: str, variant: Variant) -> None:
    """Raise when two rules give one field of one (block, site, branch) two values."""
    for one, two in combinations(variant.rules, 2):
        if one.site != two.site or not set(_cells(variant, one)) & set(_cells(variant, two)):
            continue
        a, b = said(one), said(two)
        for name in a.keys() & b.keys():
            if a[name] != b[name]:
                raise PlanError(
                    f"{where}: rules on blocks {one.blocks} and {two.blocks} give {name} of site {one.site!r} two "
                    f"values, {a[name]!r} and {b[name]!r}; leave one"
                )
