"""Legality of a plan. Run after every maker, pass, load and bind; nothing after it re-checks.

Each rule is one small function that raises `PlanError` with the row, what it got, what it needs and what to do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sized

from vivace.engine import plan as p
from vivace.engine.low_rank import KIND, PARAMS, keys_of, shapes_of
from vivace.engine.merge_rows import MergeWalk
from vivace.engine.verify_caches import CacheWalk
from vivace.engine.verify_tokens import TokenWalk
from vivace.errors import PlanError

SLOT = re.compile(r"[a-z][a-z0-9_]*\Z")
RESERVED = re.compile(r"(noise:(0|[1-9][0-9]*)|one|input:[a-z][a-z0-9_]*)\Z")
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")  # of a side-car tensor
SHA256 = re.compile(r"[0-9a-f]{64}\Z")
STORES = ("fp32", "bf16", "fp16", "fp8", "int8")
DTYPES = {"float64": 8, "float32": 4, "float16": 2}  # of side-car tensors, with bytes per element
# Far beyond any published method, low enough that a hostile plan costs little time and memory.
MAX_ROWS, MAX_OPS, MAX_TERMS, MAX_SLOTS, MAX_DRAWS = 20_000, 64, 256, 240, 1 << 30
MAX_BLOCKS, MAX_RULES = 4096, 1024
MAX_CLASSES = 64  # of tokens by age
MAX_TENSORS, MAX_RANK, MAX_ELEMENTS = 1024, 8, 1 << 32  # elements: of all side-car tensors
# Required and optional parameters, and how many slots are read besides the one changed.
TRANSFORMS: dict[str, tuple[tuple[str, ...], int]] = {
    "clamp": (("low", "high"), 0),
    "dynamic_threshold": (("ratio", "max"), 0),
    "cfg_rescale": (("phi",), 1),
    KIND: (PARAMS, 0),
}
HEARD = "guidance_cosine"  # metric of what earlier rows predicted
_LEVEL_SLACK = 1e-9  # radians of atan2(sigma, alpha): two roundings of one level are not a rise


def verify(plan: p.Plan) -> p.Plan:
    """Return `plan` unchanged if every rule holds. Raises PlanError naming the row and the rule."""
    if plan.prediction not in p.PREDICTIONS:
        raise PlanError(f"plan: prediction {plan.prediction!r} is unknown; use one of {', '.join(p.PREDICTIONS)}")
    if not 0 < len(plan.steps) <= MAX_ROWS:
        raise PlanError(f"plan: it has {len(plan.steps) or 'no'} rows; a plan needs at least one, at most {MAX_ROWS}")
    _tensors(plan.tensors)
    if plan.binding is not None:
        _binding(plan.binding)
    _count("init", "ops", plan.init, MAX_OPS)
    walk = _Walk(plan)
    for op in plan.init:
        if not isinstance(op, p.Affine):
            raise PlanError("init: only Affine ops may fill the first slots")
        walk.op("init", -1, op)
    for i, step in enumerate(plan.steps):
        walk.row(i, step)
    walk.tokens.end()
    shapes_of(plan, None if plan.binding is None else plan.binding.latent_shape)
    if "x" not in walk.live:
        raise PlanError(f"plan: no row writes slot 'x', which holds the result (live: {walk.names()})")
    if plan.results[:1] != ("x",) or len(set(plan.results)) < len(plan.results) or set(plan.results) - set(walk.live):
        raise PlanError(f"plan: results {_short(plan.results)}; need 'x' first, then other filled slots, each once")
    if len(walk.used) > MAX_SLOTS:
        raise PlanError(f"plan: its ops name {len(walk.used)} slots; at most {MAX_SLOTS}, so rotate those of history")
    return plan


class _Walk:
    """State of the walk from the first row to the last: which slots are filled, what the caches hold."""

    def __init__(self, plan: p.Plan) -> None:
        self.plan = plan
        self.live: dict[str, int] = {}  # slot -> row that wrote it (-1: init)
        self.raw: dict[str, int] = {}  # slot that holds a raw network output -> row of its evaluation
        self.caches = CacheWalk(None if plan.binding is None else plan.binding.blocks)
        self.tokens = TokenWalk(plan)
        self.merges = MergeWalk(any(step.guard is not None for step in plan.steps))
        self.used: set[str] = set()  # slots an op or the network touches, inputs included
        self.tensors = {info.key for info in plan.tensors}
        self.ages: int | None = None  # classes of every AgeRef
        self.heard: bool | None = None  # guards read what earlier rows predicted, or look at blocks
        self.level = math.inf
        self.evaluated = False

    def names(self) -> str:
        text = ", ".join(sorted(self.live)) or "none"
        return text if len(text) <= 200 else f"{text[:200]}..."

    def row(self, i: int, step: p.Step) -> None:
        where = f"step {i}"
        _count(where, "ops", step.ops, MAX_OPS)
        _count(where, "net inputs", step.net_inputs, MAX_TERMS)
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

    def _numbers(self, where: str, step: p.Step) -> None:
        for name in ("timestep", "alpha", "sigma", "x_scale"):
            _finite(where, name, getattr(step, name))
        if step.alpha < 0 or step.sigma < 0 or step.alpha == step.sigma == 0:
            raise PlanError(f"{where}: level alpha={step.alpha}, sigma={step.sigma}; need both >= 0 and not both 0")
        if any(value and not 1e-100 <= value <= 1e100 for value in (step.alpha, step.sigma)):
            raise PlanError(f"{where}: level alpha={step.alpha}, sigma={step.sigma}; need 0 or within 1e-100 to 1e100")
        for weight in step.forecast:
            _finite(where, "forecast weight", weight)
        for name, coef in step.net_inputs:
            _name(where, "net input", name)
            if isinstance(coef, p.AgeRef):
                raise PlanError(f"{where}: net input {name!r} goes by token age; the network takes one number a row")
            self._coef(where, f"net input {name!r}", coef)

    def _evaluation(self, where: str, i: int, step: p.Step, variant: p.Variant) -> None:
        if step.x not in self.live:
            raise PlanError(f"{where}: the network reads empty slot {step.x!r} (live: {self.names()})")
        self._variant(where, variant, step)
        self.tokens.note(variant)
        self.used.update((step.x, *step.outs))
        if len(step.outs) != len(variant.branches) or len(set(step.outs)) != len(step.outs):
            raise PlanError(
                f"{where}: outs {_short(step.outs)} for branches {variant.branches}; one slot per branch, all different"
            )
        if step.guard is not None:
            self._guard(where, step, step.guard)
        for out, branch in zip(step.outs, variant.branches, strict=True):
            _slot_name(where, out)
            self.live[out], self.raw[out] = i, self.caches.source(variant, branch, i)
        self.caches.keep(where, i, variant, step.guard is not None)
        self.evaluated = True

    def _guard(self, where: str, step: p.Step, guard: p.Guard) -> None:
        _name(where, "guard metric", guard.metric)
        for value in (guard.threshold, *guard.params):
            _finite(where, "guard threshold or parameter", value)
        if guard.rule not in ("below", "above", "accumulated_below"):
            raise PlanError(f"{where}: guard rule {guard.rule!r}; use below, above or accumulated_below")
        self._variant(f"{where} guard", guard.otherwise, step)
        if self.heard not in (None, guard.metric == HEARD):
            raise PlanError(f"{where}: a guard on {HEARD!r} and one that looks at blocks; a plan has one kind of both")
        self.heard = guard.metric == HEARD
        most = guard.params or (1.0,)
        fits = guard.rule != "accumulated_below" and len(most) == 1 and most[0] >= 1.0 and most[0] == int(most[0])
        if self.heard and (not fits or (guard.params and guard.sticky)):
            raise PlanError(
                f"{where}: a guard on {HEARD!r} is above or below a threshold; its parameter, if any, is a whole "
                "number of rows, and then it is not sticky"
            )
        extra = set(guard.otherwise.branches) - set(step.branches)
        if extra:
            raise PlanError(
                f"{where}: guard runs branches {sorted(extra)} for which the row has no out slot; "
                "both variants must agree on slots"
            )

    def _variant(self, where: str, variant: p.Variant, step: p.Step) -> None:
        branches = variant.branches
        _name(where, "model", variant.model)
        _name(where, "selector", variant.selector)
        for name, value in variant.selector_params:
            _name(where, "selector parameter", name)
            _finite(where, f"selector parameter {name!r}", value)
        _count(where, "rules", variant.rules, MAX_RULES)
        if "cond" not in branches or len(set(branches)) != len(branches) or set(branches) - set(p.BRANCHES):
            raise PlanError(f"{where}: branches {_short(branches)}; need 'cond' and others of {p.BRANCHES}, each once")
        _finite(where, "keep", variant.keep)
        binding = self.plan.binding
        tokens = 1 if binding is None else binding.tokens
        if not 0 < variant.keep <= tokens:
            raise PlanError(f"{where}: keep {variant.keep}; need 0 < keep <= {tokens}")
        if binding is not None and variant.keep != tokens and variant.keep % binding.token_group:
            raise PlanError(f"{where}: keep {variant.keep:g}; need a multiple of the token group {binding.token_group}")
        for rule in variant.rules:
            _rule(where, rule, None if binding is None else _parts(binding, rule), branches)
        check_conflicts(where, variant)
        self.tokens.check(where, step, variant)
        self.caches.read(where, variant, step, not self.evaluated)
        self.merges.check(where, variant, tokens)

    def op(self, where: str, i: int, op: p.Op) -> None:
        dst = p.writes(op)
        _slot_name(where, dst)
        _count(where, f"terms of {dst!r}", p.coefs(op), MAX_TERMS)
        self.used.add(dst)
        for slot in p.reads(op):
            if slot not in self.live and not RESERVED.match(slot):
                hint = "; order 2 and more need earlier evaluations" if slot[:1] == "m" and slot[1:].isdigit() else ""
                raise PlanError(f"{where}: update of {dst!r} reads empty slot {slot!r} (live: {self.names()}){hint}")
            if slot.startswith("noise:"):
                if i < 0 and slot != "noise:0":
                    raise PlanError(f"init: reads {slot!r}; the start is drawn from 'noise:0'")
                if int(slot.removeprefix("noise:")) >= MAX_DRAWS:
                    raise PlanError(f"{where}: update of {dst!r} reads draw {slot!r}; draws go to {MAX_DRAWS - 1}")
            elif slot != "one":
                self.used.add(slot)
        if isinstance(op, p.Affine):
            self._affine(where, i, op)
        else:
            _transform(where, op, dst in self.raw)
        for coef in p.coefs(op):
            self._coef(where, f"update of {dst!r}", coef)
        self.live[dst] = i
        if isinstance(op, p.Affine):
            self.raw.pop(dst, None)

    def _affine(self, where: str, i: int, op: p.Affine) -> None:
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

    def _coef(self, where: str, what: str, coef: p.Coef) -> None:
        if isinstance(coef, p.TensorRef):
            if coef.key not in self.tensors:
                raise PlanError(f"{where}: {what} uses tensor {coef.key!r}, which the side-car lacks")
        elif isinstance(coef, p.InputRef):
            if not SLOT.match(coef.name):
                raise PlanError(f"{where}: {what} uses input {coef.name!r}; lower-case letters, digits and _ needed")
            if coef.default is not None:
                _finite(where, f"default of input {coef.name!r}", coef.default)
        elif isinstance(coef, p.AgeRef):
            self._ages(where, what, coef)
        else:
            _finite(where, what, coef)

    def _ages(self, where: str, what: str, coef: p.AgeRef) -> None:
        if len(coef.values) < 3:
            raise PlanError(f"{where}: {what} has {len(coef.values)} ages; skipped, steady and older tokens need 3")
        _count(where, f"ages of {what}", coef.values, MAX_CLASSES)
        if self.ages not in (None, len(coef.values)):
            raise PlanError(f"{where}: {what} has {len(coef.values)} ages, others have {self.ages}; use as many")
        self.ages = len(coef.values)
        for value in coef.values:
            _finite(where, what, value)


def _finite(where: str, name: str, value: object) -> None:
    if not isinstance(value, float):
        raise PlanError(f"{where}: {name} is {type(value).__name__} {value!r}; a float is needed")
    if not math.isfinite(value):
        raise PlanError(f"{where}: {name} is {value}; a finite number is needed")


def _count(where: str, what: str, items: Sized, limit: int) -> None:
    if len(items) > limit:
        raise PlanError(f"{where}: {len(items)} {what}; at most {limit} fit")


def _name(where: str, what: str, name: str) -> None:
    if not name or not name.isprintable():
        raise PlanError(f"{where}: {what} is named {name!r}; printable characters needed")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _tensors(infos: tuple[p.TensorInfo, ...]) -> None:
    _count("plan", "side-car tensors", infos, MAX_TENSORS)
    keys: set[str] = set()
    elements = 0
    for info in infos:
        where = f"side-car tensor {info.key!r:.60}"
        if info.key in keys:
            raise PlanError(f"{where}: two tensors share a key; keys are distinct")
        keys.add(info.key)
        if not KEY.match(info.key):
            raise PlanError(f"{where}: a key is made of letters, digits, _ . and -, a letter or digit first")
        if len(info.shape) > MAX_RANK or any(not 0 < size <= MAX_ELEMENTS for size in info.shape):
            raise PlanError(f"{where}: shape {_short(info.shape)}; need at most {MAX_RANK} sizes, all positive")
        if info.dtype not in DTYPES:
            raise PlanError(f"{where}: dtype {info.dtype!r}; use one of {', '.join(DTYPES)}")
        if not SHA256.match(info.sha256):
            raise PlanError(f"{where}: sha256 {info.sha256!r:.80}; 64 hexadecimal digits in lower case needed")
        elements += math.prod(info.shape)
        if elements > MAX_ELEMENTS:
            raise PlanError(f"{where}: with it the side-car has {elements} elements; at most {MAX_ELEMENTS}")


def _binding(binding: p.Binding) -> None:
    _name("binding", "fingerprint", binding.fingerprint)
    sizes = (binding.blocks, binding.tokens, binding.token_group, *binding.latent_shape, binding.width or 1)
    if not binding.latent_shape or len(binding.latent_shape) > MAX_RANK or any(not 0 < n < 1 << 53 for n in sizes):
        raise PlanError(f"binding: {_short(binding)}; all sizes must be positive, the latent of 1 to {MAX_RANK} axes")
    if max(binding.blocks, binding.layers) > MAX_BLOCKS or binding.layers < 0:
        raise PlanError(f"binding: a model of {binding.blocks} blocks, {binding.layers} layers; at most {MAX_BLOCKS}")


def _slot_name(where: str, slot: str) -> None:
    if RESERVED.match(slot):
        raise PlanError(f"{where}: slot {slot!r} is reserved and read-only; write another one")
    if not SLOT.match(slot):
        raise PlanError(f"{where}: slot name {slot!r}; lower-case letters, digits and _ needed")


def _transform(where: str, op: p.Transform, raw: bool) -> None:
    if op.kind not in TRANSFORMS:
        raise PlanError(f"{where}: transform {op.kind!r} is unknown; use one of {', '.join(TRANSFORMS)}")
    names, extra = TRANSFORMS[op.kind]
    if tuple(name for name, _ in op.params) != names or len(op.reads) != extra:
        raise PlanError(f"{where}: {op.kind} takes parameters {names} and {extra} more slot(s) read, got {_short(op)}")
    if op.kind == KIND and (keys_of(op) and raw):
        raise PlanError(f"{where}: {KIND} of {op.slot!r}, an output of the network; copy it to a slot first")
    if op.kind == "clamp":
        low, high = p.coefs(op)
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise PlanError(f"{where}: clamp of {op.slot!r} to [{low}, {high}]; low must not exceed high")


def _parts(binding: p.Binding, rule: p.Rule) -> int:
    """What the range of a rule counts, in the model."""
    return binding.layers if rule.site == "layer" else binding.blocks


def _rule(where: str, rule: p.Rule, blocks: int | None, branches: tuple[str, ...]) -> None:
    first, last = rule.blocks
    if max(abs(first), abs(last)) > MAX_BLOCKS:
        raise PlanError(f"{where}: rule on blocks {rule.blocks}; a model has at most {MAX_BLOCKS} blocks")
    if blocks is not None and not 0 <= first < last <= blocks:
        raise PlanError(f"{where}: rule on blocks {rule.blocks}; need 0 <= first < last <= {blocks} (half-open)")
    same_end = (last > 0) if first >= 0 else (last <= 0)  # otherwise the model's size decides, at binding
    if same_end and first >= last:
        raise PlanError(f"{where}: rule on blocks {rule.blocks}; need first < last (half-open, negative: from the end)")
    if rule.site not in p.SITES:
        raise PlanError(f"{where}: rule on site {rule.site!r}; use one of {', '.join(p.SITES)}")
    named = branches if rule.branches is None else rule.branches
    if not named or set(named) - set(branches) or len(set(named)) < len(named):
        raise PlanError(f"{where}: rule on branches {_short(named)}; the row runs {branches}, name each once")
    if rule.weights < 0 or (rule.weights and rule.action != p.Action.FORECAST):
        raise PlanError(f"{where}: rule weights {rule.weights} go with FORECAST and are >= 0")
    if rule.order < 0 or (rule.order and rule.action not in (p.Action.COMPUTE, p.Action.FORECAST)):
        raise PlanError(f"{where}: rule order {rule.order} goes with COMPUTE or FORECAST and is >= 0")
    if rule.precision is not None and rule.precision not in p.PRECISIONS:
        raise PlanError(f"{where}: precision {rule.precision!r}; use one of {', '.join(p.PRECISIONS)}")
    if rule.store is not None and rule.store not in STORES:
        raise PlanError(f"{where}: store {rule.store!r}; use one of {', '.join(STORES)}")
    _finite(where, "share", rule.share)
    if not 0 < rule.share <= 1:
        raise PlanError(f"{where}: share {rule.share}; need 0 < share <= 1")


def said(rule: p.Rule) -> dict[str, object]:
    """Fields a rule gives a value to; the rest is left to other rules and to the model."""
    fields = {"action": rule.action, "store": rule.store, "precision": rule.precision}
    out: dict[str, object] = {name: value for name, value in fields.items() if value is not None}
    if rule.order:
        out["order"] = rule.order
    if rule.weights:
        out["weights"] = rule.weights
    if rule.share != 1.0:
        out["share"] = rule.share
    return out


def check_conflicts(where: str, variant: p.Variant) -> None:
    """Raise when two rules give one field of one (block, site, branch) two values."""
    claims: dict[tuple[str, str, str, object], list[tuple[int, int, int]]] = {}
    for number, rule in enumerate(variant.rules):
        first, last = rule.blocks
        span = (first, last) if 0 <= first < last else (0, 1)  # a range from the end stands for itself while unbound
        for branch in rule.branches or variant.branches:
            for name in said(rule):
                key = (rule.site, branch, name, None if span == rule.blocks else rule.blocks)
                claims.setdefault(key, []).append((*span, number))
    for (site, _, name, _), spans in claims.items():
        spans.sort()
        end, owner = 0, 0  # of the span that reaches furthest so far
        for first, last, number in spans:
            one, two = variant.rules[owner], variant.rules[number]
            if first < end and (a := said(one)[name]) != (b := said(two)[name]):
                raise PlanError(
                    f"{where}: rules on blocks {one.blocks} and {two.blocks} give {name} of site {site!r} two "
                    f"values, {a!r} and {b!r}; leave one"
                )
            if last > end:
                end, owner = last, number
