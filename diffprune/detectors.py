"""What goes wrong in searches under a budget, told instead of passed over."""

from math import sqrt

from torch import Tensor

from diffprune.budget import Budget
from diffprune.gated import GatedModel
from diffprune.landing import TOLERANCE, Landing, bundled, steps
from surgery import SizeModel

COLLAPSED = 0.05
"""A layer with less than this share of its units left has collapsed: little can pass it."""

NARROWEST = 8
"""From so many units on a layer with a single one left has collapsed too."""

ENOUGH = 20
"""Steps after which a search should have changed something."""


def concerns(gated: GatedModel, budget: Budget, landing: Landing, start: Tensor, steps: int) -> list[str]:
    """Sentences about the end of a search of `steps` steps whose structure is `landing`; none if all is well.

    `start`, shape (units,), is the structure without the search.
    """
    found = []
    if steps:
        changed = int((start != landing.flat).sum())
        closed = int((~landing.flat).sum())
        if steps >= ENOUGH and closed and changed == 0:
            found.append(
                f"the search of {steps} steps chose the same {closed} units as its start: a larger gate learning rate, "
                "more steps, or none at all"
            )
        expected = float(budget.cost(gated.size, gated.chance().detach().cpu()))
        hard = float(budget.cost(gated.size, (gated.hard().detach().cpu() > 0).double()))
        if abs(expected - budget.share) > TOLERANCE * budget.share:
            found.append(f"the expected cost is {expected:.1%} of the dense one where {budget.share:.1%} was asked")
        elif abs(hard - budget.share) > 0.1 * budget.share:
            found.append(
                f"the gates expect {expected:.1%} of the dense cost, but those that are open cost {hard:.1%}: many are "
                "undecided, and the cut decides for them"
            )
    kept = gated.size.keep(landing.flat)
    collapsed = [
        f"{group.name} ({left} of {group.units})"
        for group in gated.size.graph.groups
        if 0 < (left := int(kept[group.name].sum())) < group.units
        and (left < COLLAPSED * group.units or (left == 1 and group.units >= NARROWEST))
    ]
    if collapsed:
        found.append(
            f"{len(collapsed)} layer{'s' * (len(collapsed) > 1)} collapsed to a single unit or less than "
            f"{COLLAPSED:.0%} of them: {_some(collapsed)}; a larger budget keeps them alive"
        )
    return found


def untouched(size: SizeModel, round_to: int, gate_of: Tensor) -> list[str]:
    """A sentence about the groups that rounding leaves whole, since they are no wider than one step; none if none.

    Units that share a gate (`gate_of`, shape (units,)) are not rounded.
    """
    groups = [
        f"{group.name} ({group.units})"
        for group, step, shared in zip(size.graph.groups, steps(size, round_to), bundled(size, gate_of), strict=True)
        if step >= group.units > 1 and group.name not in size.drops and not shared
    ]
    if not groups:
        return []
    return [
        f"{len(groups)} of {len(size.graph.groups)} groups are one step of {round_to} channels wide and stay whole: "
        f"{_some(groups)}; a smaller round_to cuts them, at a loss of speed"
    ]


def _some(names: list[str]) -> str:
    """The first three."""
    return f"{', '.join(names[:3])}{', ...' * (len(names) > 3)}"


LOST = 0.01
"""So much less accuracy after the recovery than before it is no accident, if there are examples enough to tell."""


def lost(before: float, after: float, examples: int) -> list[str]:
    """A sentence if training ended below the accuracy that the fit had already reached; none if not.

    Beyond LOST and two standard errors of the difference between two shares of `examples`, each with two successes and
    two failures added (Agresti, Coull 1998): all right of 40 are not known to be all.
    """
    share = (before * examples + 2) / (examples + 4)
    error = 2 * sqrt(2 * share * (1 - share) / examples)
    if after >= before - max(LOST, error):
        return []
    return [
        f"training took the accuracy from {before:.1%} after the cut and fit to {after:.1%}, so it was undone: give "
        "more epochs, or a lower rate"
    ]
