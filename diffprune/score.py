"""Scores of units before any search: where the logits start."""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from diffprune.budget import Budget
from diffprune.readings import linear_layers, listening, rows_given, rows_read
from diffprune.relevance import relevance
from surgery import ChannelGraph, ExampleInputs, SizeModel, Slot, as_call, evaluating

RIDGE = 1e-3
"""Of the regression of what a layer gives on what it reads, as a share of the mean variance of the latter."""


def gains(model: nn.Module, graph: ChannelGraph, inputs: ExampleInputs) -> Tensor:
    """What the network gains by each unit: the variance that its reader explains with it beyond the better units.

    Within a group the units are ranked by their `contribution`. By least squares on `inputs`, the first n leave an
    error e(n) of what the reader gives, as a share; on the lower convex hull of e, unit n gains the fall of its segment
    per unit. All is times the `relevance` of the reader. Thus a threshold on gain per cost is the best allocation under
    a budget by Lagrange: it minimises the sum of all errors. Groups with several readers, and readers that are no plain
    layer or read more channels than there are places, keep their `contribution`.
    Shape (units,), at least 0, float64; flat in the order of `SizeModel`.

    Source: error curves per layer as in ZipLM (Kurtic et al. 2023, arXiv 2302.04089), here without removing greedily,
    and weighed by what the layer adds to its residual stream (docs/method.md).
    """
    found = list(contribution(model, graph, inputs).split([group.units for group in graph.groups]))
    matters = relevance(model, graph, inputs)
    reads: dict[str, list[int]] = {}
    for i, group in enumerate(graph.groups):
        if len(group.readers) == 1:
            name = group.readers[0].tensor
            found[i] = found[i] * matters.get(name, 1.0)
            reads.setdefault(name, []).append(i)

    def hear(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        read, given = rows_read(name, layer, x).float(), rows_given(name, layer, y).float()
        if len(read) > read.shape[1] and read.isfinite().all() and given.isfinite().all():
            for i in reads.pop(name, ()):  # a layer that runs twice is heard once
                order = found[i].argsort(descending=True, stable=True)
                positions = graph.groups[i].readers[0].positions[order]
                errors = _errors(
                    read - read.mean(0), given - given.mean(0), positions, model.get_parameter(name)[0, 0].numel()
                )
                found[i][order] = matters[name] * _falls(errors)

    args, kwargs = as_call(inputs)
    with torch.no_grad(), evaluating(model), listening(linear_layers(model, list(reads)), hear):
        model(*args, **kwargs)
    return torch.cat(found) if found else torch.empty(0)


def _errors(read: Tensor, given: Tensor, positions: Tensor, kernel: int) -> Tensor:
    """The share of `given` that is left unexplained with the first n rows of `positions`, n from 0, shape (units + 1,).

    Row i holds the channels of a unit, each of which is `kernel` columns of `read`. With these columns last and in this
    order, a row of L^-1 A^T Y, where A^T A = L L^T, is what one column adds to those before it.
    """
    columns = (positions.unsqueeze(2) * kernel + torch.arange(kernel)).flatten(1)
    others = torch.ones(read.shape[1], dtype=torch.bool).index_fill(0, columns.flatten(), False).nonzero().flatten()
    read = read[:, torch.cat((others, columns.flatten())).to(read.device)]
    gram = (read.T @ read).double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    added = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), (read.T @ given).double(), upper=False)
    base, explained = added.square().sum(1).cpu().split((len(others), columns.numel()))
    total = given.double().square().sum().cpu().clamp_min(1e-12)
    reached = torch.cat((base.sum().unsqueeze(0), explained.view(len(columns), -1).sum(1))).cumsum(0)
    return 1 - reached / total


def _falls(errors: Tensor) -> Tensor:
    """Per unit the fall of the lower convex hull of `errors`, shape (units + 1,); equal ones slightly decrease."""
    hull: list[int] = []
    values = errors.tolist()
    for n, value in enumerate(values):
        while len(hull) > 1 and (values[hull[-1]] - values[hull[-2]]) * (n - hull[-1]) >= (value - values[hull[-1]]) * (
            hull[-1] - hull[-2]
        ):
            hull.pop()
        hull.append(n)
    falls = torch.zeros(len(values) - 1, dtype=torch.float64)
    for start, end in pairwise(hull):
        falls[start:end] = max(values[start] - values[end], 0.0) / (end - start)
    return falls * torch.linspace(1, 0.999, len(falls), dtype=torch.float64)


def contribution(model: nn.Module, graph: ChannelGraph, inputs: ExampleInputs) -> Tensor:
    """The share of each unit in what its readers compute from `inputs`, summed over the readers.

    A reader's energy of channel c is Var(x_c) * |W[:, c]|^2, the variance that the channel alone gives to the reader's
    outputs (its mean goes into the next bias or normalisation); shares are relative to the sum over its channels. A
    reader that no layer of the network calls, such as a weight given to a function, counts by |W[:, c]|^2 alone.
    Shape (units,), at least 0, float64; flat in the order of `SizeModel`.
    """
    energies = {slot.tensor: torch.zeros(0) for group in graph.groups for slot in group.readers}
    tensors = dict(model.named_parameters())
    called: dict[Tensor, str] = {tensors[name]: name for name in energies if name in tensors}
    hooks = [
        module.register_forward_pre_hook(partial(_add_energy, energies, called[module.weight]))
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
        parts = [_share(energies[slot.tensor], tensors[slot.tensor], slot) for slot in group.readers]
        shares.append(torch.stack(parts).sum(0))
    return torch.cat(shares) if shares else torch.empty(0)


def _add_energy(energies: dict[str, Tensor], name: str, layer: Any, inputs: tuple[Tensor, ...]) -> None:
    """Add the energy of each channel that `layer` reads, shape (channels of its reading axis,)."""
    x, weight, groups = inputs[0], layer.weight, getattr(layer, "groups", 1)
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
    savings = []
    for group in size.graph.groups:
        saved = 1 - float(budget.cost(size, size.without(group)))
        savings.append(torch.full((group.units,), saved / group.units))
    return scores / torch.cat(savings).double().clamp_min(1e-12)


def as_logits(scores: Tensor) -> Tensor:
    """Logits in the order of `scores`: their logarithm, standardised over the network, within +-4; 0 comes last."""
    logs = scores.clamp_min(1e-6).log()
    return ((logs - logs.mean()) / logs.std(correction=0).clamp_min(1e-6)).clamp(-4, 4).float()
