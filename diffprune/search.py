"""Learning which units are worth keeping, with the budget met by construction at every step."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from diffprune.budget import Budget, shift_for
from diffprune.feeding import unpack
from diffprune.gated import GatedModel
from diffprune.gates import open_mean
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
    widths: bool = False,
    on_event: Event = lambda event: None,
) -> None:
    """Train weights and gates together for the first `steps` of a schedule of `total` steps.

    At every step one scalar is added to all logits so that the expected cost is that step's target: the gradient only
    ranks the units, there is no multiplier to tune and nothing to overshoot. Afterwards the gates are those of the end
    of the search, on target.

    With `widths` the weights stay as they are, and the gates of a group learn by their mean gradient: how many of its
    units stay is searched, which of them is left to the order that the logits start with. Few steps of a trained
    network tell the one, and only noise of the other (docs/experiments.md).
    """
    if steps == 0:
        return
    device = gated.logits.device
    family, dense_macs = gated.gate, gated.size.dense.macs
    gated.train()
    with _widths_alone(gated) if widths else nullcontext():
        weights = recipe.optimizer(gated.parameters_of_model())
        gates = torch.optim.Adam(gated.parameters_of_gates(), lr=GATE_LR)
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


@contextmanager
def _widths_alone(gated: GatedModel) -> Iterator[None]:
    """Inside, weights stay and the gates of a group move as one, by the mean of their gradients."""
    learning = [p for p in gated.parameters_of_model() if p.requires_grad]
    hook = gated.logits.register_hook(lambda gradient: open_mean(gradient, torch.ones_like(gradient), gated.group))
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for parameter in learning:
            parameter.requires_grad_(True)


def follow_(gated: GatedModel, budget: Budget, share: float) -> None:
    """Set the shift of `gated` so that its expected cost is `share` of the dense one."""
    logits = gated.logits.detach()[gated.gate_of].cpu()
    shift = shift_for(budget, gated.size, gated.gate, logits, share, float(gated.shift))
    gated.shift.fill_(shift)
