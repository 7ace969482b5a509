"""Budgets: what may remain of a network, met by construction during the search and exactly at its end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import Protocol

import torch
from torch import Tensor

from diffprune.errors import BadBudget, BudgetUnreachable
from diffprune.gates import Gate
from surgery import SizeModel

TOLERANCE = 0.01
"""A structure this close below its budget has met it."""

ROUNDING = 1e-9
"""Of shares, relative: 1 / (1 / x) may lie below x."""


COSTS = {"macs": "macs", "params": "params", "speedup": "latency"}
"""What each kind of budget limits, as `SizeModel` and `TimedSize` name it."""


class Cost(Protocol):
    """What a budget asks of a `SizeModel`; one of speed-up asks a `TimedSize`, which knows `latency` too."""

    def params(self, open_: Tensor) -> Tensor: ...

    def macs(self, open_: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Budget:
    """What may remain: exactly one of `macs` and `params`, shares of the dense cost in (0, 1], and `speedup`.

    `speedup` is dense latency / pruned latency, above 1, on the CPU that runs the search: its share is 1 / speedup.
    """

    macs: float | None = None
    params: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise _bad(f"exactly one of macs, params and speedup is asked; got {given or 'none'}")
        if self.speedup is not None and not 1 < self.speedup < float("inf"):
            raise _bad(f"speedup is dense latency / pruned latency, above 1; got {self.speedup:g}")
        if not 0 < self.share <= 1:
            raise _bad(f"{self.kind} is a share of the dense cost, above 0 and at most 1; got {self.share:g}")

    @property
    def kind(self) -> str:
        return next(kind for kind, value in vars(self).items() if value is not None)

    @property
    def asked(self) -> float:
        """The number that was given."""
        return float(vars(self)[self.kind])

    @property
    def share(self) -> float:
        """The share of the dense cost that may remain."""
        return 1 / self.asked if self.speedup is not None else self.asked

    @property
    def limit(self) -> float:
        """The largest share that meets it: of a speed-up, which is the inverse of a share, one that rounds to it."""
        return self.share * (1 + ROUNDING) if self.kind == "speedup" else self.share

    def cost(self, size: Cost, open_: Tensor) -> Tensor:
        """The cost of `open_`, shape (units,), values in [0, 1], as a share of the dense one. float64 scalar."""
        price = self.price(size)
        return price(open_) / price(torch.ones_like(open_, dtype=torch.float64))

    def price(self, size: Cost) -> Callable[[Tensor], Tensor]:
        """What `size` says of the cost that is limited, not as a share. Raises BadBudget."""
        price: Callable[[Tensor], Tensor] | None = getattr(size, COSTS[self.kind], None)
        if price is None:
            raise _bad(
                "a speed-up is asked of a network whose latency is not known", "give the TimedSize of timed_size"
            )
        return price

    def left(self, size: SizeModel, flat: Tensor) -> float:
        """The share of the dense cost that a cut leaves when the units `flat`, boolean of shape (units,), stay open.

        A width that is closed altogether has one unit left in torch; the files of a speed-up go without it.
        """
        keep = size.keep(flat)
        if self.kind != "speedup" and not all(units.any() for units in keep.values()):
            flat = size.flat(size.graph.physical(keep))
        return float(self.cost(size, flat.double()))


@dataclass(frozen=True, eq=False)
class Landing:
    """A structure that meets its budget: `flat` units kept, shape (units,); `note` says why it falls short, if so."""

    flat: Tensor
    reached: float
    note: str | None


def shift_for(budget: Budget, size: Cost, gate: Gate, logits: Tensor, share: float, start: float) -> float:
    """The scalar that, added to all `logits`, makes the expected cost `share` of the dense one, within 0.1 %.

    By bisection around `start`, which stays if it does. A share that no shift reaches gets one that opens or closes
    all.
    """
    price = budget.price(size)
    wanted = share * float(price(torch.ones_like(logits, dtype=torch.float64)))

    def left(shift: float) -> float:
        """What the budget still allows; negative above it."""
        return wanted - float(price(gate.chance(logits + shift)))

    if abs(left(start)) <= 1e-3 * wanted:
        return start
    low, high, width = start - 0.02, start + 0.02, 0.04  # the logits of the step before lie close
    while left(low) < 0 and width < 1e3:
        low, width = low - width, 2 * width
    while left(high) > 0 and width < 1e3:
        high, width = high + width, 2 * width
    middle = (low + high) / 2
    while high - low > 1e-9 * width and abs(rest := left(middle)) > 1e-3 * wanted:
        low, high = (middle, high) if rest > 0 else (low, middle)
        middle = (low + high) / 2
    return middle


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
    grid, bundled, fewest = steps(size, round_to), _bundled(size, gate_of), _fewest(size)
    flat = scores.detach().cpu().double()
    # Of bundles that cannot all go the best stays, or the one that the smallest structure has if the best is too dear.
    rich = least_share(budget, size, round_to, gate_of, flat) > budget.limit
    parts, needed = flat.split(_units(size)), _needed(size, None if rich else flat, gate_of).split(_units(size))
    order = [part.argsort(descending=True, stable=True) for part in parts]

    def widths(threshold: float) -> list[int]:
        asked = [max(int((part > threshold).sum()), n) for part, n in zip(parts, fewest, strict=True)]
        return [min(-(-n // step) * step, len(part)) for n, step, part in zip(asked, grid, parts, strict=True)]

    def opened(counts: list[int], threshold: float) -> Tensor:
        flags = [(part > threshold) | always for part, always in zip(parts, needed, strict=True)]
        for i, (ranked, n) in enumerate(zip(order, counts, strict=True)):
            if not bundled[i]:
                flags[i] = torch.zeros(len(ranked), dtype=torch.bool).index_fill(0, ranked[:n], True)
        return _without_the_unread(size, torch.cat(flags))

    def cost(counts: list[int], threshold: float) -> float:
        return budget.left(size, opened(counts, threshold))

    levels, limit = flat.unique().tolist(), budget.limit
    low, high = -1, len(levels) - 1  # levels[high] fits, levels[low] does not; -1 is left to _fill
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(widths(levels[middle]), levels[middle]) <= limit else (middle, high)
    level = levels[high]
    loose = [i for i, together in enumerate(bundled) if not together]
    counts = _fill(widths(level), loose, grid, parts, order, lambda c: cost(c, level) <= limit)
    reached = cost(counts, level)
    short = reached < budget.share * (1 - TOLERANCE)
    step = f"step of {round_to} channels" if loose else "bundle of units"
    note = f"no further {step} fits into the rest of the budget" if short else None
    return Landing(opened(counts, level), reached, note)


def _fill(
    counts: list[int],
    loose: list[int],
    grid: list[int],
    parts: Sequence[Tensor],
    order: list[Tensor],
    fits: Callable[[list[int]], bool],
) -> list[int]:
    """Add steps while any fits: best next score first, among equals where the least share of a group is kept."""
    counts, open_groups = list(counts), set(loose)
    while True:
        nexts = {
            i: (float(parts[i][order[i][counts[i]]]), -counts[i] / len(parts[i]))
            for i in open_groups
            if counts[i] < len(parts[i])
        }
        if not nexts:
            return counts
        best = max(nexts, key=lambda i: nexts[i])
        trial = [min(n + grid[best], len(parts[best])) if i == best else n for i, n in enumerate(counts)]
        if fits(trial):
            counts = trial
        else:
            open_groups.discard(best)


def _units(size: SizeModel) -> list[int]:
    return [group.units for group in size.graph.groups]


def _fewest(size: SizeModel) -> list[int]:
    """Per group the units that must stay: none in a branch that costs nothing when it is closed altogether."""
    return [0 if group.name in size.drops else 1 for group in size.graph.groups]


def _without_the_unread(size: SizeModel, flat: Tensor) -> Tensor:
    """`flat`, shape (units,), less the groups that only lead to a branch which is closed altogether."""
    keep = size.keep(flat)
    unread = [name for last, before in size.drops.items() if not keep[last].any() for name in before]
    return size.flat({**keep, **{name: torch.zeros_like(keep[name]) for name in unread}})


def _bundled(size: SizeModel, gate_of: Tensor | None) -> list[bool]:
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
    for group, bundled in zip(size.graph.groups, _bundled(size, gate_of), strict=True):
        if gate_of is not None and bundled and not group.droppable:
            best = start if scores is None else start + int(scores[start : start + group.units].argmax())
            found |= gate_of.cpu() == gate_of[best].cpu()
        start += group.units
    return found


def least(size: SizeModel, round_to: int = 1, gate_of: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
    """The smallest structure: of every group one step is open, or none if that may be. Boolean of shape (units,).

    Of bundles that cannot all go the first one is open, or the one with the best of the `scores`, shape (units,).
    """
    rows = zip(size.graph.groups, steps(size, round_to), _fewest(size), _bundled(size, gate_of), strict=True)
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


def _bad(fact: str, fix: str = "give one of them, such as Budget(macs=0.5)") -> BadBudget:
    return BadBudget(fact, at="Budget", effect="nothing was started", fix=fix)
