"""What a request under Picard iteration remembers from one iteration to the next, and what its receipt says of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from vivace.engine.receipt import Receipt


@dataclass(slots=True, eq=False)
class Iterate:
    """The last iterate of one request.

    outs: predictions by row, [n, ...] a branch; rows not evaluated yet take those of the last one that was.
    window: rows evaluated together, 0: all that are left; tolerance: of the change of a row's input, in units of its
    noise. iterations: batches evaluated so far, one after the other; evaluations, branches: rows and branches in them.
    """

    window: int
    tolerance: float
    outs: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    iterations: int = 0
    evaluations: int = 0
    branches: int = 0

    def amend(self, receipt: Receipt) -> Receipt:
        """The receipt with what was really evaluated, and a line on the iterations."""
        told = {
            "iterations": self.iterations,
            "evaluations": self.evaluations,
            "window": self.window or "all rows",
            "tolerance": self.tolerance,
        }
        details = receipt.details | {"picard": told}
        return replace(receipt, nfe=self.evaluations, branch_evals=self.branches, details=details)
