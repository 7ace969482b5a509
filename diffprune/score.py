"""Scores of units before any search: where the logits start."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from diffprune.budget import Budget
from diffprune.readings import read_by
from surgery import ChannelGraph, ExampleInputs, SizeModel, Slot, as_call, evaluating


def contribution(
    model: nn.Module, graph: ChannelGraph, inputs: ExampleInputs, matters: Mapping[str, float] | None = None
) -> Tensor:
    """The share of each unit in what its readers compute from `inputs`, summed over the readers.

    Each reader counts by what `matters` says of its weight, 1 if nothing.

    A reader's energy of channel c is Var(x_c) * |W[:, c]|^2, the variance that the channel alone gives to the reader's
    outputs (its mean goes into the next bias or normalisation); shares are relative to the sum over its channels. A
    reader that no layer of the network calls, such as a weight given to a function, counts by |W[:, c]|^2 alone.
    Shape (units,), at least 0, float64; flat in the order of `SizeModel`.
    """
    energies = {slot.tensor: torch.zeros(0) for group in graph.groups for slot in group.readers}
    tensors = dict(model.named_parameters())
    called: dict[Tensor, str] = {tensors[name]: name for name in energies if name in tensors}
    hooks = [
        module.register_forward_pre_hook(partial(_add_energy, energies, called[module.weight]), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, nn.Linear | _ConvNd) and module.weight in called
    ]
    try:
        with torch.no_grad(), evaluating(model):
            args, kwargs = as_call(inputs)
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    shares = []
    for group in graph.groups:
        parts = [
            (matters or {}).get(slot.tensor, 1.0) * _share(energies[slot.tensor], tensors[slot.tensor], slot)
            for slot in group.readers
        ]
        shares.append(torch.stack(parts).sum(0))
    return torch.cat(shares) if shares else torch.empty(0)


def _add_energy(
    energies: dict[str, Tensor], name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Add the energy of each channel that `layer` reads, shape (channels of its reading axis,)."""
    x, weight, groups = read_by(args, kwargs), layer.weight, getattr(layer, "groups", 1)
    axis = x.dim() - weight.dim() + 1 if isinstance(layer, _ConvNd) else x.dim() - 1
    spread = x.movedim(axis, 0).flatten(1).var(1, correction=0).view(groups, -1)
    reads = 0 if getattr(layer, "transposed", False) else 1
    blocks = weight.movedim(reads, 0).flatten(1).square()
    found = blocks.view(len(blocks), 1 if reads == 0 else groups, -1).sum(2).T
    energy = (spread * found).sum(0).double().cpu()
    energies[name] = energy if not len(energies[name]) else energies[name] + energy


def _share(energy: Tensor, weight: Tensor, slot: Slot) -> Tensor:
    if not len(energy):
        energy = weight.detach().movedim(slot.axis, 0).flatten(1).square().sum(1).double().cpu()
    return energy[slot.positions].sum(1) / energy.sum().clamp_min(1e-12)


def per_cost(scores: Tensor, budget: Budget, size: SizeModel) -> Tensor:
    """`scores`, shape (units,), over what the removal of a unit's group saves, per unit."""
    savings = [torch.full((group.units,), budget.saved(size, group) / group.units) for group in size.graph.groups]
    return scores / torch.cat(savings).double().clamp_min(1e-12)


def as_logits(scores: Tensor) -> Tensor:
    """Logits in the order of `scores`: their logarithm, standardised over the network, within +-4; 0 comes last."""
    scores = scores.double()
    logs = scores.clamp_min(max(1e-6 * min(float(scores.mean()), 1.0), 1e-300)).log()
    return ((logs - logs.mean()) / logs.std(correction=0).clamp_min(1e-6)).clamp(-4, 4).float()
