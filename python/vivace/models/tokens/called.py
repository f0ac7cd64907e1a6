"""The image tokens of one call of a pipeline: which a row computes, and what the others keep of every branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vivace.engine.focusing import Member, Together
from vivace.engine.kept import Kept
from vivace.engine.plan import Plan
from vivace.engine.token_layout import Layout
from vivace.engine.token_rows import focused, tokens_of
from vivace.engine.tokens import Focus, Tokens
from vivace.errors import StateError, UnsupportedError


class CallTokens:
    """The tokens of a run of a plan that is bound to their number.

    numbers: of its evaluations in the plan; values: numbers of the call by input name. The first evaluation computes
    all tokens. Where the pipeline guides, its branches keep raw predictions of their own and the plan's one branch is
    what the pipeline makes of them.
    """

    def __init__(self, plan: Plan, numbers: Sequence[int], values: Mapping[str, float]) -> None:
        self.plan, self.numbers = plan, tuple(numbers)
        defaults = {ref.name: ref.default for ref in plan.inputs if ref.default is not None}
        self.values = {**defaults, **values}
        self.rows = tokens_of(plan).rows
        self.tokens: Tokens | None = None
        self._raw: dict[str, Tensor] = {}
        self._pictures = 0  # of a branch
        self._at: tuple[int, Together] | None = None
        self._pixels: tuple[int, Tensor] | None = None

    def focus(self, number: int) -> Focus | None:
        """The tokens of an evaluation, the same for all its calls; None: all."""
        if self.rows[self.numbers[number]] is None:
            return None
        if self.tokens is None:
            raise StateError(f"evaluation {number} computes some tokens, and no evaluation of this run computed all")
        together = self._together(number)
        return together.focus or together.select()

    def complete(self, number: int, branches: Sequence[str], out: Tensor, layout: Layout) -> Tensor:
        """Predictions of all tokens, rows [branch][picture], from those of an evaluation."""
        focus, later = self.focus(number), any(row is not None for row in self.rows[self.numbers[number] + 1 :])
        parts = list(out.chunk(len(branches)))
        self._pictures = len(parts[0])
        if focus is not None:
            pixels = self._mask(number, focus, layout)
            parts = [torch.where(pixels, part, self._old(b, number)) for b, part in zip(branches, parts, strict=True)]
        if later:  # clones: what the pipeline is handed is its own
            self._raw |= {branch: part.clone() for branch, part in zip(branches, parts, strict=True)}
        return out if focus is None else torch.cat(parts)

    def advanced(
        self,
        number: int,
        outs: Sequence[Tensor],
        layout: Layout,
        seeds: Sequence[int],
        pictures: Sequence[int],
        kept: Kept | None = None,
    ) -> Tensor | None:
        """Note the complete predictions of an evaluation, one a branch of the plan; its tokens' classes.

        seeds, pictures: of the samples, for random selections; kept: what branch "cond" keeps, for those by attention.
        """
        assert self.plan.binding is not None, "bound when the run begins"
        if layout.tokens != self.plan.binding.tokens:
            raise UnsupportedError(
                f"the network reads {self.plan.binding.tokens} image tokens, the latents have {layout.tokens}: with "
                "reference pictures beside them all tokens are computed; use a plan without apply_tokens"
            )
        n, times = self._pictures, len(outs[0]) // self._pictures  # some pipelines hold latents for each branch
        if self.tokens is None:
            self.tokens = Tokens(self.plan, pictures[:n], seeds[:n], layout, outs[0][:0], self.values)
        self.tokens.kept = kept
        step, together = self.plan.steps[self.numbers[number]], self._together(number)
        assert step.variant is not None, "evaluations have a variant"
        together.merge(tuple(out[:n] for out in outs), step.branches)
        return together.classes if together.classes is None or times == 1 else together.classes.repeat(times, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all this."""
        raw = sum(tensor.nbytes for tensor in self._raw.values())
        return raw + (0 if self.tokens is None else self.tokens.nbytes)

    def _together(self, number: int) -> Together:
        if self._at is None or self._at[0] != number:
            assert self.tokens is not None, "made when the first evaluation is over"
            row, pictures = self.numbers[number], tuple(range(len(self.tokens.pictures)))
            members = (Member(self.tokens, row, pictures),)
            self._at = number, Together(members, focused(self.plan.steps[row].variant))
        return self._at[1]

    def _mask(self, number: int, focus: Focus, layout: Layout) -> Tensor:
        """bool [n, *elements] of active tokens."""
        if self._pixels is None or self._pixels[0] != number:
            none = torch.zeros((len(focus.ids), focus.tokens), dtype=torch.bool, device=focus.ids.device)
            self._pixels = number, layout.pixels(none.scatter_(1, focus.ids.long(), True))
        return self._pixels[1]

    def _old(self, branch: str, number: int) -> Tensor:
        if branch not in self._raw:
            raise StateError(
                f"evaluation {number} of the plan computes some tokens of branch {branch!r}, which no evaluation "
                "computed before: the pipeline did not run it. Let the first evaluation with it compute all"
            )
        return self._raw[branch]
