"""What a network gains by each of its units, from a few hundred images without labels or gradients."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from diffprune.compensate import RIDGE
from diffprune.readings import linear_layers, listening, rows_given, rows_read
from diffprune.relevance import relevance
from diffprune.score import contribution
from surgery import ChannelGraph, ExampleInputs, as_call, evaluating

ROUNDS = 16
"""A round of elimination takes one unit in so many away, at least one: 16 end where one at a time does."""


def gains(model: nn.Module, graph: ChannelGraph, inputs: ExampleInputs) -> Tensor:
    """The gain of each unit: the share of what its reader gives that it explains beyond the better units.

    Units of a group are eliminated worst first, with the weights of the reader fitted anew each time; the best n leave
    an error e(n). On the lower convex hull of e the n-th unit gains the fall of its segment, per unit, times the
    `relevance` of the reader. A threshold on gain per cost then is Lagrange's answer to which widths make the least
    error in all under a budget. Units with several readers, and those whose reader is no plain layer or reads more
    channels than there are places, gain their `contribution`.
    Shape (units,), at least 0, float64; flat in the order of `SizeModel`.

    Source: the optimal brain surgeon on structures and error curves of layers, as in ZipLM (Kurtic et al. 2023,
    arXiv 2302.04089); that each layer counts by its part in the residual stream is ours (docs/method.md).
    """
    matters = relevance(model, graph, inputs)
    found = list(contribution(model, graph, inputs, matters).split([group.units for group in graph.groups]))
    reads: dict[str, list[int]] = {}
    for i, group in enumerate(graph.groups):
        if len(group.readers) == 1:
            reads.setdefault(group.readers[0].tensor, []).append(i)

    def hear(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        read, given = rows_read(name, layer, x).float(), rows_given(name, layer, y).float()
        if len(read) > read.shape[1] and read.isfinite().all() and given.isfinite().all():
            kernel = model.get_parameter(name)[0, 0].numel()
            for i in reads.pop(name, ()):  # a layer that runs twice is heard once
                positions = graph.groups[i].readers[0].positions
                columns = (positions.unsqueeze(2) * kernel + torch.arange(kernel)).flatten(1)
                order, errors = eliminate(read - read.mean(0), given - given.mean(0), columns)
                found[i][order] = matters[name] * falls(errors)

    args, kwargs = as_call(inputs)
    with torch.no_grad(), evaluating(model), listening(linear_layers(model, list(reads)), hear):
        model(*args, **kwargs)
    return torch.cat(found) if found else torch.empty(0)


def eliminate(read: Tensor, given: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The units from the best to the worst, and the share of `given` that the first n of them leave unexplained.

    Row i of `columns`, shape (units, k), tells which columns of `read`, shape (rows, inputs), are those of unit i; the
    others stay. Returns shapes (units,) and (units + 1,). With H = A^T A + ridge and W = H^-1 A^T Y, the loss of the
    columns S costs <W_S, (H^-1)_SS^-1 W_S>; both are updated for what is left.
    """
    hessian = (read.T @ read).double()
    hessian.diagonal().add_(RIDGE * hessian.diagonal().mean().clamp_min(1e-12))
    target = (read.T @ given).double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    weight = inverse @ target
    total = given.double().square().sum().clamp_min(1e-12)
    errors = [float(1 - (target * weight).sum() / total)]
    order: list[int] = []
    place, alive = columns.to(read.device), torch.arange(len(columns))
    while len(alive):
        own = weight[place]
        losses = (own * torch.linalg.solve(inverse[place.unsqueeze(2), place.unsqueeze(1)], own)).sum((1, 2))
        losses = losses.clamp_min(0).cpu()  # rounding may leave dead units a little below
        worst = losses.argsort(stable=True)[: max(1, len(alive) // ROUNDS)]
        gone = place[worst.to(place.device)].flatten()
        step = torch.linalg.solve(inverse[gone][:, gone], torch.cat((inverse[gone], weight[gone]), 1))
        lost = float((weight[gone] * step[:, len(inverse) :]).sum() / total)
        parts = losses[worst].cumsum(0) / losses[worst].sum().clamp_min(1e-300)
        errors += [errors[-1] + lost * float(part) for part in parts]
        order += alive[worst].tolist()
        stays = torch.ones(len(inverse), dtype=torch.bool, device=place.device).index_fill(0, gone, False)
        weight = (weight - inverse[:, gone] @ step[:, len(inverse) :])[stays]
        inverse = (inverse - inverse[:, gone] @ step[:, : len(inverse)])[stays][:, stays]
        left = torch.ones(len(alive), dtype=torch.bool).index_fill(0, worst, False)
        alive, place = alive[left], (stays.cumsum(0) - 1)[place[left.to(place.device)]]
    return torch.tensor(order[::-1], dtype=torch.long), torch.tensor(errors[::-1], dtype=torch.float64)


def falls(errors: Tensor) -> Tensor:
    """Per unit the fall of the lower convex hull of `errors`, shape (units + 1,); equal ones slightly decrease."""
    hull: list[int] = []
    values = errors.tolist()
    for n, value in enumerate(values):
        while len(hull) > 1 and (values[hull[-1]] - values[hull[-2]]) * (n - hull[-1]) >= (value - values[hull[-1]]) * (
            hull[-1] - hull[-2]
        ):
            hull.pop()
        hull.append(n)
    found = torch.zeros(len(values) - 1, dtype=torch.float64)
    for start, end in pairwise(hull):
        found[start:end] = max(values[start] - values[end], 0.0) / (end - start)
    return found * torch.linspace(1, 0.999, len(found), dtype=torch.float64)
