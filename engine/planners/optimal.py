"""The schedule that changes pictures least under a budget, found on measured effects.

A schedule says which evaluations compute and of which order the others forecast. Evaluation r that reads values of
evaluations r - l with weights w_l, which add up to 1, changes the final latent by

    c_r = sum_l w_l effect(r, l),      the whole run by  sum_r c_r

(first order; `effect`: columns over pictures and random signs, see docs/cache_calibration.md). What is minimised is
the error of pictures in decibels: the mean over pictures of

    log(mean_signs (sum_r c_r)^2 + d sum_r mean_signs c_r^2)

where the second part (d = `DOUBT`) keeps schedules from living on cancellations that only hold to first order.

Dynamic programming over (previous, last) computed evaluation finds the best schedule if changes of different
evaluations did not add up or cancel: it minimises sum |c_r|^2 + price * computed evaluations, and the price is found
by bisection. A local search on the whole sum then moves computed evaluations and changes orders while that helps, and
starts again from random moves of the best schedule (drawn by a fixed seed) until it has looked at `MOST_MOVES`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vivace.engine.forecast import node_weights
from vivace.engine.plan import Plan
from vivace.engine.planners.base import (
    STEP,
    Planner,
    Schedule,
    Track,
    require_count,
    require_share,
    require_sites,
    required,
    times_of,
)
from vivace.engine.planners.settle import predecessors
from vivace.engine.planners.tables import Floats, array, check_table, is_table, measured_of
from vivace.errors import ArgumentError, ModelError

EFFECTS = "effect/"  # + sites: [evaluations, ages, signs, pictures]
INNER = ("attn", "cross_attn", "mlp")
BISECTIONS = 40
REACH = 6  # evaluations over which a computation is moved in one move
KICKS = 4  # random moves at most, from which the search starts again
DOUBT = 0.05  # of a change that others are told to cancel, what stays all the same: effects are of first order
MOST_MOVES = 3000  # schedules that the search looks at
FAR = 1e30

Orders = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class OptimalCache(Planner):
    """Ours: of all schedules of whole evaluations within a budget, the one with the least measured effect.

    table: a calibration table of kind "cache" of this plan, with effects. budget: share of the model's work that is
        computed at most. sites: None: attention and MLP, where the model offers them, else the trunk's "residual".
    order: highest of forecasts. last: evaluations at the clean end that compute.
    Source: docs/cache_calibration.md.
    """

    table: Any
    budget: float = 0.5
    sites: tuple[str, ...] | None = None
    order: int = 2
    last: int = 0
    searched: ClassVar[bool] = True

    def schedule(self, plan: Plan) -> Schedule:
        """One track a site, all alike."""
        budget = require_share("OptimalCache", "budget", self.budget, 1.0)
        order, last = (require_count("OptimalCache", name, getattr(self, name)) for name in ("order", "last"))
        if not is_table(self.table):
            raise ArgumentError(f"OptimalCache: table={self.table!r:.40}; a calibration table of kind 'cache' needed")
        check_table("OptimalCache", self.table, plan)
        sites = self._sites()
        effects = array("OptimalCache", self.table, EFFECTS + "+".join(sorted(sites)))
        count, outside = plan.nfe, float(self.table.metadata.get("outside", 0.0))
        if effects.ndim != 4 or len(effects) != count:
            raise ModelError(f"OptimalCache: effects of shape {effects.shape} for {count} evaluations; calibrate again")
        most = int((budget - outside) * count / (1.0 - outside) + 1e-9)
        full = required(plan) | {*range(count - last, count)}
        if most < len(full):
            least = (len(full) + outside * (count - len(full))) / count
            raise ArgumentError(
                f"OptimalCache: budget={budget:g} is less than what must be computed, {least:.3g} of the work "
                f"({len(full)} of {count} evaluations, and what is outside of blocks)"
            )
        times = times_of(plan, STEP)
        orders = _Search(effects, times, full, predecessors(plan), order).best(most)
        return Schedule(tuple(Track(site, (0, 0), orders) for site in sites), times)

    def _sites(self) -> tuple[str, ...]:
        known = [name.removeprefix(EFFECTS).split("+") for name in self.table.arrays if name.startswith(EFFECTS)]
        if self.sites is not None:
            return require_sites("OptimalCache", self.sites)
        inner = [sites for sites in known if set(sites) <= set(INNER)]
        if not known:
            raise ModelError("OptimalCache: the table has no effects; calibrate again, with effects")
        most = max(len(sites) for sites in inner or known)
        return tuple(next(sites for sites in inner or known if len(sites) == most))

    def measured(self) -> dict[str, Any] | None:
        """What the table was measured on."""
        return measured_of(self.table) if is_table(self.table) else None


class _Search:
    """Schedules of one problem, as orders of evaluations (None computes), and their scores (smaller is better)."""

    def __init__(
        self,
        effects: Floats,
        times: Sequence[float],
        full: frozenset[int] | set[int],
        before: Sequence[Sequence[int]],
        order: int,
    ) -> None:
        self.count, self.ages, self.signs, self.pictures = map(int, effects.shape)
        self.effects = effects.reshape(self.count, self.ages, -1)
        self.times, self.full, self.before, self.order = times, frozenset(full), before, order
        own = np.nanmean(np.square(effects), axis=(0, 1, 2)) if effects.size else np.ones(self.pictures)
        self.size = np.where(own > 0.0, own, 1.0)  # of every picture, so that each counts alike
        self._known: dict[tuple[int, tuple[int, ...]], Floats | None] = {}
        self._left = MOST_MOVES

    def best(self, most: int) -> Orders:
        """The best schedule that computes at most so many evaluations."""
        if most >= self.count:
            return (None,) * self.count
        starts: list[Orders] = [self._planned(most), *(self._even(most, order) for order in range(self.order + 1))]
        feasible = [s for s in starts if s.count(None) <= most and self.score(s) < math.inf]
        if not feasible:
            raise ArgumentError(
                f"OptimalCache: with {most} of {self.count} evaluations some value would be older than the {self.ages} "
                "evaluations that effects were measured for; give a larger budget"
            )
        score, best = min((self._improved(start, most) for start in feasible), key=lambda found: found[0])
        chance = random.Random(0)  # the same schedule every time
        while self._left > 0 and score > -math.inf:
            kicked = best
            for _ in range(chance.randint(2, KICKS)):
                kicked = chance.choice(self._moves(kicked, most) or [kicked])
            found, tried = self._improved(kicked, most)
            self._left -= 1
            if found < score:
                score, best = found, tried
        return best

    # ------------------------------------------------------------ scores
    def change(self, r: int, nodes: tuple[int, ...]) -> Floats | None:
        """c_r of evaluation r that reads those of `nodes`, newest first; None where it was not measured."""
        key = r, nodes
        if key not in self._known:
            ages = [r - j - 1 for j in nodes]
            ok = max(ages) < self.ages and all(j in self.before[r] for j in nodes)
            columns = self.effects[r, ages] if ok else np.full((1, 1), np.nan)
            weights = node_weights([self.times[j] for j in nodes], self.times[r]) if len(nodes) > 1 else (1.0,)
            self._known[key] = np.asarray(weights) @ columns if np.isfinite(columns).all() else None
        return self._known[key]

    def changes(self, orders: Sequence[int | None]) -> dict[int, Floats] | None:
        """c_r of all evaluations that do not compute; None where some cannot be."""
        found: dict[int, Floats] = {}
        computed: list[int] = []
        for r, order in enumerate(orders):
            if order is None:
                computed.insert(0, r)
                continue
            change = self.change(r, tuple(computed[: order + 1])) if computed else None
            if change is None:
                return None
            found[r] = change
        return found

    def score(self, orders: Sequence[int | None]) -> float:
        """Mean log error of the pictures, infinite for what cannot be."""
        found = self.changes(orders)
        if not found:
            return math.inf if found is None else -math.inf
        apart = np.sum([self._squares(change) for change in found.values()], axis=0)
        return self._score(np.sum(list(found.values()), axis=0), apart)

    def _score(self, whole: Floats, apart: Floats) -> float:
        """Mean log error of a sum of changes; apart: sum of their squares by picture."""
        return float(np.log(np.maximum(self._squares(whole) + DOUBT * apart, 1e-300)).mean())

    def _squares(self, change: Floats) -> Floats:
        """Mean square over signs, by picture."""
        found: Floats = np.square(change).reshape(self.signs, self.pictures).mean(0)
        return found

    # ------------------------------------------------------------ starts
    def _even(self, most: int, order: int) -> Orders:
        """Computations spread evenly, all others of one order as far as there are values."""
        free = [r for r in range(self.count) if r not in self.full]
        more = most - len(self.full)
        chosen = self.full | {free[(2 * i + 1) * len(free) // (2 * more)] for i in range(more)}
        done = 0
        orders: list[int | None] = []
        for r in range(self.count):
            done += r in chosen
            orders.append(None if r in chosen else min(order, done - 1))
        return tuple(orders)

    def _planned(self, most: int) -> Orders:
        """The least sum of squared changes with at most so many computations, by a price on each."""
        costs = self._costs()
        low, high, best = 0.0, 1.0, self._walked(costs, 0.0)
        while best.count(None) > most and self._walked(costs, high).count(None) > most and high < FAR:
            low, high = high, 4.0 * high
        if best.count(None) > most:
            best = self._walked(costs, high)
            for _ in range(BISECTIONS):
                middle = 0.5 * (low + high)
                found = self._walked(costs, middle)
                if found.count(None) > most:
                    low = middle
                else:
                    high, best = middle, found
        return best

    def _costs(self) -> dict[tuple[int, int], tuple[Floats, list[Any]]]:
        """By (previous, last): sums of squared changes of the evaluations after it, and orders; previous -1: none."""
        costs = {}
        for last in range(self.count):
            for previous in range(-1, last):
                sums, orders, total = [0.0], [], 0.0
                for r in range(last + 1, self.count):
                    if r in self.full or total >= FAR:
                        break
                    choices = [self._square(r, (last,))]
                    choices += [self._square(r, (last, previous))] if previous >= 0 and self.order else []
                    total += min(choices)
                    orders.append(int(np.argmin(choices)))
                    sums.append(total)
                costs[previous, last] = np.array(sums), orders
        return costs

    def _square(self, r: int, nodes: tuple[int, ...]) -> float:
        change = self.change(r, nodes)
        if change is None:
            return FAR
        return float((self._squares(change) / self.size).mean())

    def _walked(self, costs: dict[tuple[int, int], tuple[Floats, list[Any]]], price: float) -> Orders:
        """The cheapest way through (previous, last) to the end."""
        state: dict[tuple[int, int], tuple[float, tuple[int, int] | None]] = {(-1, 0): (price, None)}
        end: tuple[float, tuple[int, int]] = (math.inf, (-1, 0))
        for last in range(self.count):
            for previous in range(-1, last):
                if (previous, last) not in state:
                    continue
                have = state[previous, last][0]
                sums, _ = costs[previous, last]
                for skipped, spent in enumerate(sums):
                    r, total = last + 1 + skipped, have + spent
                    if r == self.count:
                        end = min(end, (total, (previous, last)))
                    elif total + price < state.get((last, r), (math.inf, None))[0]:
                        state[last, r] = total + price, (previous, last)
        orders: list[int | None] = [None] * self.count
        place: tuple[int, int] | None = end[1]
        stop = self.count
        while place is not None:
            chosen = costs[place][1]
            for r in range(place[1] + 1, stop):
                orders[r] = chosen[r - place[1] - 1]
            stop, place = place[1], state[place][1]
        return tuple(orders)

    # ------------------------------------------------------------ local search
    def _improved(self, orders: Orders, most: int) -> tuple[float, Orders]:
        """Moves of a computation, one more or one less, with orders set anew, while any helps."""
        score, orders = self._ordered(orders)
        better = True
        while better and self._left > 0:
            better = False
            for move in self._moves(orders, most):
                found, tried = self._ordered(move)
                self._left -= 1
                if found < score - 1e-9:
                    score, orders, better = found, tried, True
                    break
        return score, orders

    def _moves(self, orders: Orders, most: int) -> list[Orders]:
        """Schedules with one computation elsewhere, or one more."""
        free = [r for r in range(self.count) if r not in self.full]
        computed = [r for r in free if orders[r] is None]
        others = [r for r in free if orders[r] is not None]
        pairs = sorted((abs(a - b), a, b) for a in computed for b in others if abs(a - b) <= REACH)
        moves = [_moved(orders, a, b) for _, a, b in pairs]
        return moves + ([_moved(orders, None, b) for b in others] if orders.count(None) < most else [])

    def _ordered(self, orders: Orders) -> tuple[float, Orders]:
        """The schedule with the orders that suit the whole sum best, one evaluation after the other."""
        possible: list[tuple[int, list[tuple[int, Floats]]]] = []
        computed: list[int] = []
        for r, order in enumerate(orders):
            if order is None:
                computed.insert(0, r)
                continue
            found = [
                (o, self.change(r, tuple(computed[: o + 1]))) for o in range(min(self.order, len(computed) - 1) + 1)
            ]
            known = [(o, change) for o, change in found if change is not None]
            if not known:
                return math.inf, orders
            possible.append((r, known))
        if not possible:
            return -math.inf, orders
        chosen = [next((i for i, (o, _) in enumerate(known) if o == orders[r]), 0) for r, known in possible]
        whole = np.sum([known[i][1] for i, (_, known) in zip(chosen, possible, strict=True)], axis=0)
        squares = [[self._squares(change) for _, change in known] for _, known in possible]
        apart = np.sum([of[i] for i, of in zip(chosen, squares, strict=True)], axis=0)
        score, better = self._score(whole, apart), True
        while better:
            better = False
            for n, (_, known) in enumerate(possible):
                others, spread = whole - known[chosen[n]][1], apart - squares[n][chosen[n]]
                tries = [(others + change, spread + of) for (_, change), of in zip(known, squares[n], strict=True)]
                scores = [self._score(*tried) for tried in tries]
                least = int(np.argmin(scores))
                if scores[least] < score - 1e-9:
                    score, better, chosen[n] = scores[least], True, least
                    whole, apart = tries[least]
        made = list(orders)
        for i, (r, known) in zip(chosen, possible, strict=True):
            made[r] = known[i][0]
        return score, tuple(made)


def _moved(orders: Orders, computed: int | None, other: int) -> Orders:
    """`other` computes in place of `computed`."""
    made = list(orders)
    made[other] = None
    if computed is not None:
        made[computed] = 0
    return tuple(made)
