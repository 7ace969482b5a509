"""The end of a search: the largest structure within a budget that keeps what scores best."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, inf, lcm

import torch
from torch import Tensor

from diffprune.budget import Budget
from diffprune.errors import BudgetUnreachable
from surgery import SizeModel

TOLERANCE = 0.01
"""A structure this close below its budget has met it."""


@dataclass(frozen=True, eq=False)
class Landing:
    """A structure that meets its budget: `flat` units kept, shape (units,); `note` says why it falls short, if so.

    `reopened` units are kept only because widths come in steps.
    """

    flat: Tensor
    reached: float
    note: str | None
    reopened: int = 0


def steps(size: SizeModel, round_to: int) -> list[int]:
    """Per group, how many units make one step of its width.

    Wherever the group lies, the width it takes stays a multiple of `round_to` if it was one, else of their greatest
    common divisor: no layer comes to lie worse on the grid than it was.
    """

    def step(units: int, channels: int) -> int:
        grid = gcd(round_to, units * channels)
        return grid // gcd(grid, channels)

    return [lcm(*(step(g.units, slot.positions.shape[1]) for slot in g.slots)) for g in size.graph.groups]


def land(
    budget: Budget, size: SizeModel, scores: Tensor, *, round_to: int = 1, gate_of: Tensor | None = None
) -> Landing:
    """The largest structure within the budget that keeps the best `scores`, shape (units,).

    Every group keeps at least one step of its width, but for branches that cost nothing when they are closed altogether
    (`size.drops`). Widths are rounded up to steps by re-opening the best closed units, and a threshold on the scores is
    bisected on the true cost. What is left of the budget is then filled step by step in the order of the scores. Units
    that share a gate (`gate_of`, shape (units,)) stay or go together; their groups are neither rounded nor filled up,
    and may be closed altogether where that is possible.
    Raises BudgetUnreachable.
    """
    require_reachable(budget, size, round_to, gate_of)
    flat = scores.detach().cpu().double()
    # Of bundles that cannot all go the best stays, or the one that the smallest structure has if the best is too dear.
    rich = least_share(budget, size, round_to, gate_of, flat) > budget.limit
    units, needed = _units(size), _needed(size, None if rich else flat, gate_of)
    parts = flat.split(units), needed.split(units), steps(size, round_to), _fewest(size), bundled(size, gate_of)
    widths = [_Width(*of_group) for of_group in zip(*parts, strict=True)]

    def opened(counts: Sequence[int], threshold: float) -> Tensor:
        flags = [width.opened(count, threshold) for width, count in zip(widths, counts, strict=True)]
        return _without_the_unread(size, torch.cat(flags))

    def cost(counts: Sequence[int], threshold: float) -> float:
        return budget.left(size, opened(counts, threshold))

    levels, limit = [-inf, *flat.unique().tolist()], budget.limit
    low, high = -1, len(levels) - 1  # levels[high] fits, levels[low] does not; -1 is left to _fill
    while high - low > 1:
        middle = (low + high) // 2
        trial = [width.rounded(levels[middle]) for width in widths]
        low, high = (low, middle) if cost(trial, levels[middle]) <= limit else (middle, high)
    level = levels[high]
    rounded = [width.rounded(level) for width in widths]
    reopened = int(opened(rounded, level).sum() - opened([width.above(level) for width in widths], level).sum())
    counts = _fill(rounded, widths, lambda c: cost(c, level) <= limit)
    reached = cost(counts, level)
    short = reached < budget.share * (1 - TOLERANCE)
    tied = " or bundle of units" * any(width.bundled for width in widths)
    step = f"step of {round_to} channel{'s' * (round_to > 1)}{tied}"
    note = f"no further {step} fits into the rest of the budget" if short else None
    return Landing(opened(counts, level), reached, note, reopened)


@dataclass(frozen=True, eq=False)
class _Width:
    """A group while it is landed: the `scores` of its units, those that are `needed` in any case, shape (units,)."""

    scores: Tensor
    needed: Tensor
    step: int
    fewest: int
    bundled: bool

    @cached_property
    def order(self) -> Tensor:
        return self.scores.argsort(descending=True, stable=True)

    def above(self, threshold: float) -> int:
        """How many units are, or must stay in any case."""
        return max(int((self.scores > threshold).sum()), self.fewest)

    def rounded(self, threshold: float) -> int:
        """The same in whole steps."""
        asked = self.above(threshold)
        return min(-(-asked // self.step) * self.step, len(self.scores))

    def opened(self, count: int, threshold: float) -> Tensor:
        """The best `count` units, of bundles all above the threshold."""
        if self.bundled:
            return (self.scores > threshold) | self.needed
        return torch.zeros(len(self.order), dtype=torch.bool).index_fill(0, self.order[:count], True)

    def next(self, count: int) -> tuple[float, float]:
        """What speaks for a step more than `count`: the next score, among equals that few of the units are kept."""
        return float(self.scores[self.order[count]]), -count / len(self.scores)


def _fill(counts: list[int], widths: Sequence[_Width], fits: Callable[[list[int]], bool]) -> list[int]:
    """Add steps while any fits, the best next score first."""
    counts, going = list(counts), {i for i, width in enumerate(widths) if not width.bundled}
    while True:
        going = {i for i in going if counts[i] < len(widths[i].scores)}
        if not going:
            return counts
        best = max(going, key=lambda i: widths[i].next(counts[i]))
        trial = list(counts)
        trial[best] = min(counts[best] + widths[best].step, len(widths[best].scores))
        if fits(trial):
            counts = trial
        else:
            going.discard(best)


def _units(size: SizeModel) -> list[int]:
    return [group.units for group in size.graph.groups]


def _fewest(size: SizeModel) -> list[int]:
    """Per group the units that must stay: none in a branch that costs nothing when it is closed altogether."""
    return [0 if group.name in size.drops else 1 for group in size.graph.groups]


def _without_the_unread(size: SizeModel, flat: Tensor) -> Tensor:
    """`flat`, shape (units,), less the groups that only lead to a branch which is closed altogether."""
    if not size.drops:
        return flat
    keep = size.keep(flat)
    unread = [name for last, before in size.drops.items() if not keep[last].any() for name in before]
    return size.flat({**keep, **{name: torch.zeros_like(keep[name]) for name in unread}})


def bundled(size: SizeModel, gate_of: Tensor | None) -> list[bool]:
    """Per group, does one of its units share its gate?"""
    if gate_of is None:
        return [False] * len(size.graph.groups)
    shared = gate_of.cpu().bincount()[gate_of.cpu()] > 1
    return [bool(part.any()) for part in shared.split(_units(size))]


def _needed(size: SizeModel, scores: Tensor | None, gate_of: Tensor | None) -> Tensor:
    """Units, shape (units,), of bundled groups that cannot be closed altogether: those of the best gate of each.

    Without scores, of the first gate of each.
    """
    found = torch.zeros(size.units, dtype=torch.bool)
    start = 0
    for group, shared in zip(size.graph.groups, bundled(size, gate_of), strict=True):
        if gate_of is not None and shared and not group.droppable:
            best = start if scores is None else start + int(scores[start : start + group.units].argmax())
            found |= gate_of.cpu() == gate_of[best].cpu()
        start += group.units
    return found


def least(size: SizeModel, round_to: int = 1, gate_of: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
    """The smallest structure: of every group one step is open, or none if that may be. Boolean of shape (units,).

    Of bundles that cannot all go the first one is open, or the one with the best of the `scores`, shape (units,).
    """
    rows = zip(size.graph.groups, steps(size, round_to), _fewest(size), bundled(size, gate_of), strict=True)
    flags = torch.cat([torch.arange(g.units) < step * fewest * (not bundled) for g, step, fewest, bundled in rows])
    return _without_the_unread(size, flags | _needed(size, scores, gate_of))


def least_share(
    budget: Budget,
    size: SizeModel,
    round_to: int = 1,
    gate_of: Tensor | None = None,
    scores: Tensor | None = None,
) -> float:
    """The share of the dense cost that the smallest structure has."""
    return budget.left(size, least(size, round_to, gate_of, scores))


def require_reachable(budget: Budget, size: SizeModel, round_to: int = 1, gate_of: Tensor | None = None) -> None:
    """Raises BudgetUnreachable."""
    share = least_share(budget, size, round_to, gate_of)
    if share > budget.limit:
        raise unreachable(budget, share, round_to)


def unreachable(budget: Budget, share: float, round_to: int) -> BudgetUnreachable:
    """The refusal of a budget, where `share` of the dense cost is the least that can remain."""
    if budget.kind == "speedup":
        fact = f"a speed-up of {budget.asked:.3g} is asked; the largest reachable is {1 / share:.3g}"
        fix, kept = f"ask for {0.99 / share:.3g} or less", "group but whole residual branches keeps"
    else:
        fact = f"{budget.asked:.3g} of the dense {budget.kind} is asked; the least reachable is {share:.3g}"
        fix, kept = f"ask for {min(share * 1.01, 1):.3g} or more", "group keeps"
    return BudgetUnreachable(
        fact,
        at=f"every {kept} at least one step of its width, widths are multiples of {round_to} where they were",
        effect="nothing was cut",
        fix=fix
        + (", or for a smaller round_to" if round_to > 1 else "; `diffprune inspect` lists what is pinned and why"),
    )
