"""`print(plan)`: one line per row. The printed form is part of the interface and golden-tested."""

from __future__ import annotations

import difflib
from math import isinf
from typing import Any

from vivace.engine.caching import KEYS
from vivace.engine.plan import Action, Affine, AgeRef, Coef, InputRef, Op, Plan, Rule, Step, TensorRef, Variant
from vivace.engine.prediction import to_eps, to_x0
from vivace.engine.token_rows import focused

HEADER = ("#", "t", "lam", "net", "branches", "blocks", "keep", "ops")
LETTERS = "CRFI"  # by Action
_SHORT = {"uncond": "unc", "perturbed": "per"}


def number(value: float, digits: int = 4) -> str:
    """Shortest form at `digits` significant digits, without a leading zero: .98, 4, -1.25e-05."""
    text = f"{value:.{digits}g}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def render_plan(plan: Plan) -> str:
    """Head line, start line, and the table of rows."""
    rows = [HEADER, *(row_cells(i, step, plan) for i, step in enumerate(plan.steps))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*_head(plan), *table])


def render_diff(one: Plan, two: Plan, names: tuple[str, str] = ("a", "b")) -> str:
    """Unified difference of two printouts without column padding; empty when the plans are equal."""
    if one.hash == two.hash:
        return ""
    a, b = ([*_head(p), *("  ".join(row_cells(i, step, p)) for i, step in enumerate(p.steps))] for p in (one, two))
    return "\n".join(difflib.unified_diff(a, b, *names, lineterm="", n=0))


def _head(plan: Plan) -> list[str]:
    """What is said of the whole plan: where it comes from, what it costs, how it starts."""
    head = [f"plan {plan.hash[:12]}", _made_by(plan), f"prediction {plan.prediction}", f"nfe {plan.nfe}"]
    head += [f"branch_evals {plan.branch_evals}", f"variants {len(plan.variants)}"]
    if plan.binding is None:
        head.append("unbound")
    else:
        b = plan.binding
        head.append(f"bound {b.fingerprint[:12]} {'x'.join(map(str, b.latent_shape))} {b.blocks} blocks")
    return [" | ".join(head), "start  " + "; ".join(render_op(op, plan.prediction, None) for op in plan.init)]


def row_cells(i: int, step: Step, plan: Plan) -> tuple[str, ...]:
    """The printed cells of row `i`, in the order of `HEADER`."""
    lam = ("inf" if step.lam > 0 else "-inf") if isinf(step.lam) else f"{step.lam:.3f}"
    ops = "; ".join(render_op(op, plan.prediction, step) for op in step.ops)
    mark = " restart" if step.restart else ""
    if step.forecast:
        mark += f" forecast {','.join(number(weight) for weight in step.forecast)}"
    variant = step.variant
    if variant is None:
        return str(i), number(step.timestep, 6), lam, "-", "-", "-", "-", ops + mark
    tokens = None if plan.binding is None else plan.binding.tokens
    blocks = None if plan.binding is None else plan.binding.blocks
    keep = number(variant.keep) if tokens is None else f"{variant.keep:.0f}/{tokens}"
    keep += _selector(variant)
    branches = "+".join(_SHORT.get(branch, branch) for branch in variant.branches)
    cells = (number(step.timestep, 6), lam, _precision(variant), branches, _blocks(variant, blocks), keep)
    guard = step.guard
    if guard is not None:
        mark += f" guard {guard.metric} {guard.rule} {number(guard.threshold)}: {_blocks(guard.otherwise, blocks)}"
    return (str(i), *cells, ops + mark)


def _selector(variant: Variant) -> str:
    """Who chooses tokens, and how many rows one goes without at most: " deviation<=8"."""
    if not focused(variant):
        return ""
    bound = dict(variant.selector_params).get("bound", -1.0)
    return f" {variant.selector}" + (f"<={bound:g}" if bound >= 0 else "")


def _made_by(plan: Plan) -> str:
    recipe = plan.recipe
    if recipe is None:
        return "made by hand"
    args = recipe.arguments.to_dict()
    passes = "".join(f" + {_pass(name, pass_args.to_dict())}" for name, pass_args in recipe.passes)
    tail = "" if recipe.tail is None else f" tail {number(recipe.tail)}"
    return f"{args.get('solver') or args.get('scheduler') or recipe.maker}{_history(args)}{tail}{passes}"


def _pass(name: str, args: dict[str, Any]) -> str:
    """A pass, with the planner that it was given and what it did to the solver's history."""
    planner = args.get("by") or args.get("planner") or args.get("guards")
    return name.removeprefix("apply_") + (f" {planner}" if planner else "") + _history(args)


def _history(args: dict[str, Any]) -> str:
    return "" if args.get("history", "own") == "own" else f" history {args['history']}"


def _precision(variant: Variant) -> str:
    said = dict.fromkeys(rule.precision for rule in variant.rules if rule.precision is not None)
    name = "+".join(said) or "model"
    return name if variant.model == "main" else f"{variant.model}:{name}"


def _blocks(variant: Variant, blocks: int | None) -> str:
    """Letters, one per block, when bound; the rules themselves while unbound."""
    rules = [rule for rule in variant.rules if rule.action is not None and rule.site != "merge"]
    merged = [_merged(rule) for rule in variant.rules if rule.site == "merge"]
    if blocks is None:
        return ",".join([*map(_said, rules), *merged]) or "all"
    of = [rule for rule in rules if rule.site != "layer"]  # which counts otherwise
    letters = "".join(_letter([rule for rule in of if _covers(rule, block)]) for block in range(blocks))
    return ",".join([letters, *(_said(rule) for rule in rules if not _is_plain(rule)), *merged])


def _letter(rules: list[Rule]) -> str:
    """What a block does: C compute, R or F when nothing of it is computed, in lower case when some of it is."""
    whole = [rule for rule in rules if rule.site in ("block", "residual")]
    inner = [rule for rule in rules if rule.site not in ("block", "residual", *KEYS, "merge")]
    for rule in whole:
        if rule.action != Action.COMPUTE:
            return LETTERS[rule.action or 0]
    done = [LETTERS[rule.action or 0] for rule in inner if rule.action != Action.COMPUTE]
    if not done:
        return "C"
    letter = max(done, key=LETTERS.index)
    return letter if len(done) == len(inner) > 1 else letter.lower()


def _covers(rule: Rule, block: int) -> bool:
    return rule.branches is None and rule.blocks[0] <= block < rule.blocks[1]


def _is_plain(rule: Rule) -> bool:
    """The letters say all of it."""
    return rule.site == "block" and rule.branches is None and not rule.order and rule.store is None


def _said(rule: Rule) -> str:
    return (
        f"{_where(rule)}{LETTERS[rule.action or 0]}{rule.order or ''}{'' if rule.store is None else '/' + rule.store}"
    )


def _merged(rule: Rule) -> str:
    """Blocks that merge a share of their tokens: by a new map, M, or by the last one, m."""
    return f"{rule.blocks[0]}:{rule.blocks[1] or ''}{'M' if rule.action == Action.COMPUTE else 'm'}{number(rule.share)}"


def _where(rule: Rule) -> str:
    site = "" if rule.site == "block" else f"{rule.site}."
    branches = "" if rule.branches is None else "+".join(_SHORT.get(b, b) for b in rule.branches) + "."
    return f"{rule.blocks[0]}:{rule.blocks[1] or ''}{branches and '.' + branches[:-1]}{site and '.' + site[:-1]}="


def render_op(op: Op, prediction: str, step: Step | None) -> str:
    """One op as an assignment; a prediction conversion at the row's own level is named x0(...) or eps(...)."""
    if not isinstance(op, Affine):
        params = ",".join(f"{name}={_coef(coef)}" for name, coef in op.params)
        return f"{op.slot}={op.kind}({','.join((op.slot, *op.reads))};{params})"
    at = "" if op.at is None else f"@{op.at}"
    return f"{op.dst}{at}={_conversion(op, prediction, step) or _sum(op)}"


def _conversion(op: Affine, prediction: str, step: Step | None) -> str:
    if step is None or op.at is not None or not op.terms:
        return ""
    terms = dict(op.terms)
    others = [slot for slot in terms if slot != step.x]
    if len(op.terms) not in (1, 2) or len(others) != 1 or (len(op.terms) == 2 and step.x not in terms):
        return ""
    got = (terms.get(step.x, 0.0), terms[others[0]])
    for target, convert, level in (("x0", to_x0, step.alpha), ("eps", to_eps, step.sigma)):
        if prediction == target or level == 0.0:
            continue
        want = convert(prediction, step.alpha, step.sigma)
        if all(isinstance(g, float) and abs(g - w) <= 1e-12 * (1 + abs(w)) for g, w in zip(got, want, strict=True)):
            return f"{target}({others[0]})"
    return ""


def _sum(op: Affine) -> str:
    text = ""
    for slot, coef in op.terms:
        if isinstance(coef, float):
            value = number(coef).lstrip("-")
            sign = "-" if coef < 0 else "+"
            text += f"{sign}{'' if value == '1' else value}{_SHORT.get(slot, slot)}"
        else:
            text += f"+{_coef(coef)}*{_SHORT.get(slot, slot)}"
    return text.removeprefix("+") or "0"


def _coef(coef: Coef) -> str:
    if isinstance(coef, TensorRef):
        return f"[{coef.key}]"
    if isinstance(coef, InputRef):
        return f"{{{coef.name}{'' if coef.default is None else '=' + number(coef.default)}}}"
    if isinstance(coef, AgeRef):
        return f"age({','.join(number(value) for value in coef.values)})"
    return number(coef)
