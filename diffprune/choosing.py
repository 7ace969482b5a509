"""What to keep of a network: units are scored, gates searched, and the budget is landed on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from diffprune.budget import Budget
from diffprune.detectors import concerns, untouched
from diffprune.errors import BadData
from diffprune.gated import GatedModel
from diffprune.landing import Landing, land
from diffprune.score import per_cost
from diffprune.search import search_
from diffprune.stopwatch import Stopwatch, apart, doubts
from diffprune.training import Event, Recipe
from surgery.rebuilding import copied

Scores = Callable[[nn.Module, surgery.ChannelGraph, Tensor], Tensor]
"""From a network, its graph and images to what each unit is worth: shape (units,), at least 0, in graph order."""


@dataclass(frozen=True, eq=False)
class Choice:
    """`keep` per group, how the `budget` was met, and the steps that the search took."""

    keep: dict[str, Tensor]
    budget: dict[str, Any]
    search_steps: int
    warnings: list[str]


def score_(gated: GatedModel, parent: nn.Module, images: Tensor, scores: Scores, budget: Budget) -> None:
    """Start the logits of `gated` from what each unit is worth, per cost. Raises BadData.

    The network that `scores` gets is its own: one that trains it, or leaves gradients, changes nothing else.
    """
    worth = torch.as_tensor(scores(copied(parent), gated.graph, images)).detach().double().cpu()
    if worth.shape != (gated.size.units,) or (worth < 0).any():
        least = f", the least {worth.min():g}" if worth.numel() else ""
        raise _bad_scores(
            f"{gated.size.units} units got scores of shape {tuple(worth.shape)}{least}",
            "give one score of at least 0 for each unit, in the order of graph.groups",
        )
    if not worth.isfinite().all():
        raise _bad_scores(
            "scores are no finite numbers: the network computes values that are not finite from the first training "
            "batches, or what gives the scores does",
            "look for values that are not finite in the data, in the weights, and in scores of your own",
        )
    gated.start_from_(per_cost(worth, budget, gated.size))


def _bad_scores(fact: str, fix: str) -> BadData:
    return BadData(fact, at="the scores of units", effect="nothing was started", fix=fix)


def choose(
    gated: GatedModel,
    parent: nn.Module,
    batches: Iterator[Any],
    budget: Budget,
    recipe: Recipe,
    *,
    round_to: int,
    total: int,
    watch: Stopwatch | None,
    tell: Event,
) -> Choice:
    """Search for the recipe's share of `total` steps, all of them if the network is frozen, and land on the budget.

    The search learns how much of each group stays; which units, the scores have decided. Without steps they decide
    alone. A `watch` measures what is chosen until the speed-up asked is met.
    """

    aim = watch.predictable(budget, round_to, gated.gate_of) if watch else budget

    def landed() -> Landing:
        return land(aim, gated.size, gated.scores(), round_to=round_to, gate_of=gated.gate_of)

    frozen = not any(p.requires_grad for p in parent.parameters())
    share = 1.0 if frozen else recipe.search
    steps = min(max(round(share * total), 1), total) if share else 0
    start = landed()
    search_(gated, batches, aim, recipe, steps=steps, total=total, parent=parent, widths=True, on_event=tell)
    if watch:
        landing, measured = watch.land(budget, gated.scores(), round_to, gated.gate_of, tell)
        noise, note = doubts(measured), apart(budget, measured, round_to)
        met: dict[str, Any] = {"reached": measured.speedup, "low": measured.low, "high": measured.high, "note": note}
    else:
        landing, noise = landed() if steps else start, []
        met = {"reached": landing.reached, "note": landing.note}
    met = {"kind": budget.kind, "asked": budget.asked, **met, "round_to": round_to, "reopened": landing.reopened}
    whole = untouched(gated.size, round_to, gated.gate_of)
    warnings = concerns(gated, aim, landing, start.flat, steps) + whole + noise + [met["note"]] * bool(met["note"])
    return Choice(gated.size.keep(landing.flat), met, steps, warnings)
