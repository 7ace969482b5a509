"""Budgets: what may remain of a network, met by construction at every step of a search."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffprune.errors import BadBudget
from diffprune.gates import Gate
from surgery import ChannelGroup, SizeModel

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

    `speedup` is dense latency / pruned latency, above 1, on the machine that runs the search: its share is 1 / speedup.
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
                "a speed-up is asked of a network whose latency is not known", "give the TimedSize of timed_file"
            )
        return price

    def saved(self, size: SizeModel, group: ChannelGroup) -> float:
        """The share of the dense cost that goes with all of `group` alone."""
        return 1 - float(self.cost(size, size.without(group)))

    def left(self, size: SizeModel, flat: Tensor) -> float:
        """The share of the dense cost that a cut leaves when the units `flat`, boolean of shape (units,), stay open.

        A width that is closed altogether has one unit left in torch; the files of a speed-up go without it.
        """
        if self.kind != "speedup":
            keep = size.keep(flat)
            if not all(units.any() for units in keep.values()):
                flat = size.flat(size.graph.physical(keep))
        return float(self.cost(size, flat.double()))


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


def _bad(fact: str, fix: str = "give one of them, such as Budget(macs=0.5)") -> BadBudget:
    return BadBudget(fact, at="Budget", effect="nothing was started", fix=fix)
