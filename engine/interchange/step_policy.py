"""`diffusion_step_policy`: which denoising steps of a quantized checkpoint run with 16-bit activations.

It stands in a checkpoint's transformer/config.json under `quantization_config.runtime.diffusion_step_policy`:

    {"schema_version": 1, "type": "first_last_n", "index_space": "denoising_loop_iteration", "scope": ["transformer"],
     "default_mode": "native", "first_steps": {"count": 3, "mode": "a16"}, "last_steps": {"count": 3, "mode": "a16"},
     "overlap": "a16", "reasoner": "a16"}

Iteration i of n runs "a16" (weights dequantized, 16-bit activations) when i < first or i >= n - last, else "native" (as
the checkpoint is quantized: W8A8, W4A4); a run of one iteration is native. All branches of an iteration agree. Every
field is needed, no other is known, and each has the values shown; what varies are the counts (>= 0), `scope` (readers
look for "transformer" in it) and `reasoner` ("native" | "a16": the text tower of models that have one, for all steps).
No policy (`runtime` null, or without it): native throughout.

Source: the readers and the writer in vllm-project/vllm-omni#6560 (which defines it; also docs/user_guide/quantization/
modelopt.md there), sgl-project/sglang#36380, huggingface/diffusers#14664, NVIDIA/TensorRT-LLM#17476 (readers) and
NVIDIA/cosmos-framework#217 (writer); carried by nvidia/Cosmos3-Nano, -Super and -Super-I2V, revision fp8.
"""

from __future__ import annotations

from typing import Any

from vivace.engine.interchange.cells import block_count, cells, read_json, recorded, require_plain
from vivace.engine.passes.rules import evaluations, span, with_rules
from vivace.engine.plan import PRECISIONS, Plan, Rule
from vivace.engine.plan_codec import MAX_INT
from vivace.errors import ArgumentError, PlanError, UnsupportedError

A16 = "bf16"
FIXED: dict[str, Any] = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "default_mode": "native",
    "overlap": "a16",
}
WINDOWS = ("first_steps", "last_steps")
FIELDS = (*FIXED, "scope", *WINDOWS, "reasoner")
NATIVE = {"FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8", "INT8": "int8", "W8A8": "int8"}  # by quant_algo


def apply_step_policy(plan: Plan, policy: Any, *, native: str | None = "auto") -> Plan:
    """precision("a16" iterations) = "bf16", precision("native" iterations) = `native`, of all blocks and branches.

    Args:
        plan: says nothing of precision yet; bound or not.
        policy: the policy, a `quantization_config` or a whole config that holds one, or the path of such a JSON file.
        native: the plan's name of the checkpoint's own quantization, "int8" | "fp8"; None: left to the model; "auto":
            by `quant_algo`, "fp8" for a policy alone, None for formats that plans have no name for.
    Returns: the plan with one rule more in every evaluated row; its recipe names this pass.
    Raises: ArgumentError naming file and field; PlanError for a plan that states precisions; UnsupportedError.
    """
    found, where, algorithm = _find(policy)
    _check(found, where)
    if native == "auto":
        native = "fp8" if algorithm is None else NATIVE.get(algorithm)
    if native is not None and native not in PRECISIONS:
        raise ArgumentError(f"apply_step_policy: native {native!r}; use one of {', '.join(PRECISIONS)}, auto or None")
    require_plain(plan, "apply_step_policy")
    for row, variant in evaluations(plan):
        if any(rule.precision is not None for rule in variant.rules):
            raise PlanError(f"apply_step_policy: row {row} states a precision already; start from a plan without any")
    everywhere = span(plan, 0, 0)
    rules = [
        () if precision is None else (Rule(everywhere, precision=precision),)
        for precision in _pattern(found, plan.nfe, native)
    ]
    return with_rules(plan, rules, "apply_step_policy", {"policy": found, "native": native})


def to_step_policy(plan: Plan) -> dict[str, Any]:
    """The policy that the plan's precisions amount to: "bf16" rows are a16, the others native.

    A policy that the recipe recorded is returned as it was while the rows still say the same.
    Raises: UnsupportedError naming the first row that a policy cannot express.
    """
    require_plain(plan, "to_step_policy")
    rows = [row for row, _ in evaluations(plan)]
    precisions = [_precision(plan, row) for row in rows]
    natives = [precision for precision in precisions if precision != A16]
    for row, precision in zip(rows, precisions, strict=True):
        if precision == "fp32" or (precision != A16 and precision != natives[0]):
            raise UnsupportedError(
                f"to_step_policy: row {row} is in {precision or 'no stated precision'}; a policy tells {A16} (a16) "
                f"from one quantized precision (native, here {natives[0] or 'not stated'})"
            )
    args = recorded(plan, "apply_step_policy")
    if args is not None and _pattern(args["policy"], plan.nfe, args["native"]) == precisions:
        return dict(args["policy"])
    high = [precision == A16 for precision in precisions]
    first = high.index(False) if False in high else len(high)
    last = high[first:][::-1].index(False) if False in high else 0
    if any(high[first : len(high) - last]):
        row = rows[first + high[first:].index(True)]
        raise UnsupportedError(
            f"to_step_policy: row {row} is in {A16} between rows that are not; a policy has {A16} rows only at the "
            "beginning and at the end"
        )
    if high == [True]:
        raise UnsupportedError(f"to_step_policy: row {rows[0]} is in {A16}, but runs of one step are always native")
    counts = {name: {"count": count, "mode": "a16"} for name, count in zip(WINDOWS, (first, last), strict=True)}
    return {**FIXED, "scope": ["transformer"], **counts, "reasoner": "a16"}


def _pattern(policy: dict[str, Any], rows: int, native: str | None) -> list[str | None]:
    """The precision of each of `rows` iterations."""
    first, last = (policy[name]["count"] for name in WINDOWS)
    return [A16 if rows > 1 and (i < first or i >= rows - last) else native for i in range(rows)]


def _precision(plan: Plan, row: int) -> str | None:
    """The one precision of a row, None when it says nothing. Raises UnsupportedError."""
    variant = plan.steps[row].variant
    assert variant is not None
    said = cells(variant, "precision", block_count(plan)[0])
    values = {value for line in said.values() for value in line}
    whole = {("block", branch) for branch in variant.branches}
    if not said:
        return None
    if set(said) != whole or len(values) != 1:
        raise UnsupportedError(
            f"to_step_policy: row {row} states precisions by block, site or branch; a policy speaks of whole rows"
        )
    precision: str = values.pop()
    return precision


def _find(source: Any) -> tuple[dict[str, Any], str, str | None]:
    """(policy, where it stands, quant_algo) of a policy, a quantization config, a whole config, or a file of one."""
    data, where = read_json(source, "policy")
    algorithm = None
    for field in ("quantization_config", "runtime", "diffusion_step_policy"):
        if field in data:
            algorithm = data.get("quant_algo", algorithm)
            data, where = data[field], f"{where}: {field}"
            if not isinstance(data, dict):
                raise ArgumentError(f"{where}: got {data!r:.60}; an object with a diffusion_step_policy is needed")
    if "quant_algo" in data or "_class_name" in data:
        raise ArgumentError(f"{where}: holds no runtime.diffusion_step_policy; without one every step is native")
    return data, where, algorithm


def _check(policy: dict[str, Any], where: str) -> None:
    """Every field as the readers need it. Raises ArgumentError naming the field."""
    for field in policy:
        if field not in FIELDS:
            raise ArgumentError(f"{where}: field {field!r:.60} is unknown; known: {', '.join(FIELDS)}")
    for field in FIELDS:
        if field not in policy:
            raise ArgumentError(f"{where}: field {field!r} is missing; needed: {', '.join(FIELDS)}")
    for field, value in FIXED.items():
        if type(policy[field]) is not type(value) or policy[field] != value:
            raise ArgumentError(f"{where}: {field}: got {policy[field]!r:.60}; {value!r} is needed")
    scope = policy["scope"]
    if not isinstance(scope, list) or not all(isinstance(name, str) for name in scope) or "transformer" not in scope:
        raise ArgumentError(f"{where}: scope: got {scope!r:.60}; a list of names with 'transformer' is needed")
    if policy["reasoner"] not in ("native", "a16"):
        raise ArgumentError(f"{where}: reasoner: got {policy['reasoner']!r:.60}; 'native' or 'a16' is needed")
    for field in WINDOWS:
        window = policy[field]
        if not isinstance(window, dict) or set(window) != {"count", "mode"} or window["mode"] != "a16":
            raise ArgumentError(f"{where}: {field}: got {window!r:.60}; {{'count': n, 'mode': 'a16'}} is needed")
        if type(window["count"]) is not int or not 0 <= window["count"] <= MAX_INT:
            raise ArgumentError(f"{where}: {field}.count: got {window['count']!r:.60}; an integer >= 0 is needed")
