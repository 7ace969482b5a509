"""torch-pruning's pruners, run by their own code, from a network to one of a given share of its MACs."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffprune.feeding import unpack
from diffprune.training import Recipe, answers

SPARSE_SHARE = 0.3
"""Share of all steps that pruners with a regulariser of their own train with it before they prune."""

UPDATES = 10
"""So often GrowingReg raises its regularisation during these steps; elsewhere it does so once an epoch."""


@dataclass(frozen=True)
class Peer:
    """One pruner and the criterion that its authors give it. `gradients` fills what the criterion reads."""

    importance: Callable[[], Any]
    pruner: Any = tp.pruner.MagnitudePruner
    gradients: Callable[[Any, nn.Module, Tensor, Tensor], None] | None = None
    across: bool = True
    regularises: bool = False
    options: dict[str, float] = field(default_factory=dict)


def _taylor(criterion: Any, model: nn.Module, x: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model(x), labels).backward()


def _hessian(criterion: Any, model: nn.Module, x: Tensor, labels: Tensor) -> None:
    for image, label in zip(x[:128, None], labels[:128, None], strict=True):
        model.zero_grad()
        F.cross_entropy(model(image), label).backward()
        criterion.accumulate_grad(model)


PEERS = {
    "magnitude": Peer(lambda: tp.importance.GroupMagnitudeImportance(p=2)),
    "taylor": Peer(tp.importance.GroupTaylorImportance, gradients=_taylor),
    "hessian": Peer(tp.importance.GroupHessianImportance, gradients=_hessian),
    "bn-scale": Peer(tp.importance.BNScaleImportance, tp.pruner.BNScalePruner, regularises=True, options={"reg": 5e-4}),
    "group-norm": Peer(
        lambda: tp.importance.GroupMagnitudeImportance(p=2), tp.pruner.GroupNormPruner, regularises=True,
        options={"reg": 5e-4},
    ),
    "growing-reg": Peer(
        lambda: tp.importance.GroupMagnitudeImportance(p=2), tp.pruner.GrowingRegPruner, regularises=True,
        options={"reg": 5e-4, "delta_reg": 1e-4},
    ),
    "uniform": Peer(lambda: tp.importance.GroupMagnitudeImportance(p=2), across=False),
    "random": Peer(tp.importance.RandomImportance),
}
"""The regularisers' strengths are those of torch-pruning's own CIFAR script, which gives group_sl normalizer="max" as
well; here it has the default, "mean". Without training magnitude, group-norm and growing-reg are one and the same.
"uniform" takes the same share of every layer."""


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiplications of convolutions and linear layers, counted by torch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    return counter.get_total_flops() // 2 // len(example)


def sparsify_(
    model: nn.Module, peer: Peer, kept: list[nn.Module], batches: Iterator[Any], recipe: Recipe, *,
    steps: int, total: int, parent: nn.Module,
) -> None:
    """Train with the pruner's own regulariser for the first `steps` of a schedule of `total`."""
    optimizer = recipe.optimizer(model.parameters())
    pruner: Any = None
    for step in range(steps):
        x, labels = unpack(next(batches), next(model.parameters()).device)
        pruner = pruner or _pruner(peer, model, x[:2], 0.5, kept, peer.importance())
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, total)
        with recipe.casting(x.device):
            loss = recipe.loss(model(x), labels, answers(parent, x))
        optimizer.zero_grad()
        loss.backward()
        pruner.regularize(model)
        optimizer.step()
        if hasattr(pruner, "update_reg") and (step + 1) % max(steps // UPDATES, 1) == 0:
            pruner.update_reg()
    model.eval()


def pruned(
    model: nn.Module, peer: Peer, share: float, kept: list[str], x: Tensor, labels: Tensor, seed: int = 0
) -> nn.Module:
    """A copy of `model` with the largest pruning that leaves at most `share` of its MACs, found by bisection.

    Layers named in `kept` keep their outputs. The criterion sees the images `x` and, for its gradients, their `labels`;
    a random one draws from `seed`.
    """
    whole, low, high, best = macs(model, x[:1]), 0.0, 1.0, None
    scored = _scored(model, peer, x, labels)
    for _ in range(12):
        ratio = (low + high) / 2
        small = _once(scored, peer, ratio, kept, x, seed)
        if macs(small, x[:1]) <= share * whole:
            high, best = ratio, small
        else:
            low = ratio
    assert best is not None, "no pruning ratio reaches the share"
    return best


def _scored(model: nn.Module, peer: Peer, x: Tensor, labels: Tensor) -> tuple[nn.Module, Any]:
    """A copy of `model`, and its criterion with the gradients that it reads."""
    model, criterion = copy.deepcopy(model).eval(), peer.importance()
    if peer.gradients:
        peer.gradients(criterion, model, x, labels)
    return model, criterion


def _once(
    scored: tuple[nn.Module, Any], peer: Peer, ratio: float, kept: list[str], x: Tensor, seed: int
) -> nn.Module:
    torch.manual_seed(seed)
    small, criterion = copy.deepcopy(scored)
    for mine, given in zip(small.parameters(), scored[0].parameters(), strict=True):
        mine.grad = copy.deepcopy(given.grad)  # which a copy of a parameter leaves out
    _pruner(peer, small, x[:2], ratio, [small.get_submodule(name) for name in kept], criterion).step()
    small.zero_grad(set_to_none=True)
    return small


def _pruner(peer: Peer, model: nn.Module, x: Tensor, ratio: float, kept: list[nn.Module], criterion: Any) -> Any:
    return peer.pruner(
        model, x, importance=criterion, global_pruning=peer.across, pruning_ratio=ratio, ignored_layers=kept,
        in_channel_groups={}, out_channel_groups={}, num_heads={}, **peer.options,
    )
