"""What the precision rules of a row say, block by block, for those who run it."""

from __future__ import annotations

from vivace.engine.plan import Plan, Variant
from vivace.errors import UnsupportedError

SITES = ("attn", "mlp")
QUANTIZED = ("int8", "fp8")  # which need weights of their own

# Of one block: the precision of its attention's linears and of its MLP's; None: the model's own.
BlockPrecision = tuple[str | None, str | None]


def precisions_of(variant: Variant, blocks: int) -> tuple[BlockPrecision, ...]:
    """Of every block (attention, MLP): a site's rule counts over its block's, None where nothing is said.

    Raises: UnsupportedError for precisions that differ by branch, since branches share a forward, or of other sites.
    """
    found: dict[str, list[str | None]] = {site: [None] * blocks for site in ("block", *SITES)}
    for rule in variant.rules:
        if rule.precision is None:
            continue
        if rule.site not in found:
            raise UnsupportedError(f"precision {rule.precision} of site {rule.site!r}; use block, attn or mlp")
        if rule.branches is not None and set(rule.branches) != set(variant.branches):
            raise UnsupportedError(f"precision {rule.precision} of branch {rule.branches[0]!r} alone; name no branches")
        first, last = rule.blocks
        first, last = first + blocks * (first < 0), last + blocks * (last <= 0)
        found[rule.site][first:last] = [rule.precision] * (last - first)
    attn, mlp = (
        [own if own is not None else whole for own, whole in zip(found[site], found["block"], strict=True)]
        for site in SITES
    )
    return tuple(zip(attn, mlp, strict=True))


def named(variant: Variant) -> frozenset[str]:
    """The precisions that the rules of a variant name."""
    return frozenset(rule.precision for rule in variant.rules if rule.precision is not None)


def spelled(variant: Variant) -> str:
    """The precisions of a row in words: "model", "int8", "bf16+int8"."""
    return "+".join(sorted(named(variant))) or "model"


def states_precision(plan: Plan) -> bool:
    """Some row names a precision."""
    return any(named(variant) for variant in plan.variants)
