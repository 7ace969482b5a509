"""The training pieces that search, recovery and the dense parent share. Bring your own loop if you have one."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffprune.errors import BadData, TrainingDiverged
from diffprune.feeding import logits, require_labels, unpack
from surgery import evaluating

Event = Callable[[dict[str, Any]], None]
"""Is told of every training step and finished stage, as a flat dict that JSON can hold."""


TRUST = 0.05
"""Of the length of all weights, what one step of a recovery may move them by with all its momentum. Without that a
small network lost half of its accuracy in an epoch; ResNet-20 and 56 stay below it (docs/experiments.md)."""

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Recipe:
    """How weights are trained: SGD with Nesterov momentum under one one-cycle schedule.

    `lr` is the peak; 0.01 is a tenth of the rate such networks are usually trained from scratch with: a larger one
    throws away what a cut network still knows (docs/experiments.md). `distill` is the share of the loss that imitates
    the dense parent at `temperature`; `hints` the weight of the distance between what the layers of both read, which
    is added to it. `clip` is the longest that the gradient of all weights together may be, if anything: training from
    scratch under a tight budget asks for it, a recovery has a limit of its own. With `precision` "bfloat16" networks
    run under autocast, which takes half the time where the processor has such instructions (GPUs, AVX512_BF16) and
    much more where it has not; weights, gates and losses stay float32. `search` is the share of all steps that gates
    learn in before the cut, one step at least; with 0 units are chosen by their scores alone. With `compensate` what is
    left is fitted to the dense network after the cut, by least squares.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distill: float = 0.9
    temperature: float = 4.0
    hints: float = 200.0
    warm_up: float = 0.05
    clip: float | None = None
    precision: Precision = "float32"
    search: float = 0.05
    compensate: bool = True

    def __post_init__(self) -> None:
        for name in ("distill", "warm_up", "search"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is at least 0 and at most 1; got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is at least 0 and below 1; got {self.momentum}")
        for name in ("lr", "hints", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is at least 0; got {getattr(self, name)}")
        for name in ("temperature", "clip"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is above 0; got {value}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is one of {', '.join(get_args(Precision))}; got {self.precision!r}")

    @property
    def limit(self) -> float:
        """Of the gradient's length."""
        return math.inf if self.clip is None else self.clip

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a step: linear warm-up, then a half cosine to zero."""
        peak = self.warm_up * total
        if step < peak:
            return self.lr * (step + 1) / (peak + 1)
        return self.lr * 0.5 * (1 + cos(pi * (step - peak) / max(total - peak, 1)))

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
        """Of those that are not frozen; there may be none."""
        group = {"params": [p for p in parameters if p.requires_grad]}
        return torch.optim.SGD(
            [group], lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.momentum > 0
        )

    def casting(self, device: torch.device) -> torch.autocast:
        """Inside, networks compute in `precision`."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def loss(self, output: Tensor, labels: Tensor | None, parent: Tensor | None) -> Tensor:
        """Cross-entropy with the labels, and Kullback-Leibler divergence from the parent (Hinton et al. 2015)."""
        output, t = _at_least_float32(logits(output)), self.temperature
        if labels is not None:
            require_labels(labels, *output.shape, at="a training batch", effect="the run was stopped")
        if parent is None:
            if labels is None:
                raise BadData(
                    "the images have no labels, and without labels a parent to imitate is needed",
                    at="the loss of a step", effect="nothing was learned",
                    fix="give labels, or a trained network that a smaller one can imitate (weights, no parent epochs)",
                )
            return F.cross_entropy(output, labels)
        theirs = F.log_softmax(_at_least_float32(parent) / t, 1)
        imitate = t**2 * F.kl_div(F.log_softmax(output / t, 1), theirs, log_target=True, reduction="batchmean")
        if labels is None:
            return imitate
        return (1 - self.distill) * F.cross_entropy(output, labels) + self.distill * imitate


def forward(model: nn.Module, inputs: Tensor) -> Any:
    """What the network gives for `inputs`. Raises BadData for a batch of one where BatchNorm takes statistics of it."""
    try:
        return model(inputs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise BadData(
            f"BatchNorm can take no statistics of a batch of {len(inputs)}",
            at="a training batch, often the last of an epoch",
            effect="the run was stopped",
            fix="give DataLoader(drop_last=True), or another batch size",
        ) from error


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def step_(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    loss: Tensor,
    *,
    phase: str,
    step: int,
    limit: float = math.inf,
) -> float:
    """One update, with the gradient of all weights together no longer than `limit`; how long it was.

    Raises TrainingDiverged for a loss that is not finite, before it spoils the weights.
    """
    if not torch.isfinite(loss):
        raise _diverged(f"the loss is {loss.item()} at step {step} of the {phase} phase", model)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    length = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
    for optimizer in optimizers:
        optimizer.step()
    return length


def require_finite(model: nn.Module, inputs: Tensor, *, phase: str) -> None:
    """Raise TrainingDiverged if a phase left a network that answers `inputs` with values that are not finite.

    Batch norm can keep the loss of a training step finite with weights that overflow in eval mode.
    """
    with torch.no_grad(), evaluating(model):
        output: Tensor = model(inputs)
    if not torch.isfinite(output).all():
        raise _diverged(f"the network answers with values that are not finite after the {phase} phase", model)


def _diverged(fact: str, model: nn.Module) -> TrainingDiverged:
    return TrainingDiverged(
        fact,
        at=f"training {type(model).__name__}",
        effect="the run was stopped; no result was written",
        fix="lower the learning rate, and look for values that are not finite in the data",
    )


def fit_(
    model: nn.Module,
    batches: Iterator[Any],
    recipe: Recipe,
    *,
    steps: range,
    total: int,
    parent: nn.Module | None = None,
    hint: Callable[[], Tensor] | None = None,
    phase: str,
    on_event: Event = lambda event: None,
) -> None:
    """Train `model` in place for the given steps of a schedule of `total` steps, imitating `parent` if there is one.

    `hint` gives what is added to the loss after both have run, times `recipe.hints`; see `hints.hinting`. With it no
    step's gradient may be longer than the first one's, nor than what TRUST allows: a fitted network starts near the
    bottom of a steep valley, and a wide one, or a small one, that leaves it does not come back in few steps.
    """
    device = next(model.parameters()).device
    optimizer = recipe.optimizer(model.parameters())
    model.train()
    limit = recipe.limit if hint is None else min(recipe.limit, _trusted(model, recipe))
    for step in steps:
        inputs, labels = unpack(next(batches), device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, total)
        with recipe.casting(device):
            loss = recipe.loss(forward(model, inputs), labels, answers(parent, inputs))
            if hint is not None:
                loss = loss + recipe.hints * hint()
        length = step_(model, [optimizer], loss, phase=phase, step=step, limit=limit)
        limit = min(limit, length) if hint is not None and step == steps.start else limit
        on_event({"phase": phase, "step": step + 1, "steps": total, "loss": loss.item()})
    if steps:
        require_finite(model, inputs, phase=phase)


def _trusted(model: nn.Module, recipe: Recipe) -> float:
    """The length of the gradient with which a step at the peak rate moves the weights by TRUST of their length."""
    length = float(nn.utils.get_total_norm([p for p in model.parameters() if p.requires_grad]))
    return TRUST * length * (1 - recipe.momentum) / recipe.lr if recipe.lr else math.inf


def answers(parent: nn.Module | None, inputs: Tensor) -> Tensor | None:
    """What the parent says, without gradients."""
    if parent is None:
        return None
    with torch.no_grad():
        output: Tensor = parent(inputs)
    return output
