"""Learning which units are worth keeping, with the budget met by construction at every step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diffprune.budget import Budget, shift_for
from diffprune.feeding import unpack
from diffprune.gated import GatedModel
from diffprune.training import Event, Recipe, answers, forward, require_finite, step_

GATE_LR = 0.005
"""Adam, constant. Larger ones follow the noise of single batches: 0.02 ended 0.3 points lower (docs/experiments.md)."""

RAMP = 0.4
"""Share of the search in which the target falls from the dense cost to the budget."""


def search_(
    gated: GatedModel,
    batches: Iterator[Any],
    budget: Budget,
    recipe: Recipe,
    *,
    steps: int,
    total: int,
    parent: nn.Module | None,
    on_event: Event = lambda event: None,
) -> None:
    """Train weights and gates together for the first `steps` of a schedule of `total` steps.

    At every step one scalar is added to all logits so that the expected cost is that step's target: the gradient only
    ranks the units, there is no multiplier to tune and nothing to overshoot. Afterwards the gates are those of the end
    of the search, on target.
    """
    if steps == 0:
        return
    device = gated.logits.device
    weights = recipe.optimizer(gated.parameters_of_model())
    gates = torch.optim.Adam(gated.parameters_of_gates(), lr=GATE_LR)
    family, dense_macs = gated.gate, gated.size.dense.macs
    gated.train()
    for step in range(steps):
        progress = (step + 1) / steps
        target = 1 + (budget.share - 1) * min(1.0, progress / RAMP)
        gated.gate = family.at(progress)
        follow_(gated, budget, target)
        macs = float(gated.size.macs(gated.chance().detach().cpu())) / dense_macs  # whatever the budget is on
        for group in weights.param_groups:
            group["lr"] = recipe.rate(step, total)
        inputs, labels = unpack(next(batches), device)
        with recipe.casting(device):
            loss = recipe.loss(forward(gated, inputs), labels, answers(parent, inputs))
        step_(gated, [weights, gates], loss, phase="search", step=step, limit=recipe.limit)
        on_event({"phase": "search", "step": step + 1, "steps": total, "loss": loss.item(), "macs": macs})
    require_finite(gated, inputs, phase="search")
    follow_(gated, budget, target)


def follow_(gated: GatedModel, budget: Budget, share: float) -> None:
    """Set the shift of `gated` so that its expected cost is `share` of the dense one."""
    logits = gated.logits.detach()[gated.gate_of].cpu()
    shift = shift_for(budget, gated.size, gated.gate, logits, share, float(gated.shift))
    gated.shift.fill_(shift)
