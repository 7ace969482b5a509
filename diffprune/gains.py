"""What a network gains by each of its units, from a few hundred images without labels or gradients."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from diffprune.compensate import RIDGE
from diffprune.readings import linear_layers, listening, rows_given, rows_read
from diffprune.relevance import relevance
from diffprune.score import contribution
from surgery import ChannelGraph, ExampleInputs, as_call, evaluating
from surgery.twins import twinned

ROWS = 2
"""Times the number of inputs: with fewer rows the fit would follow the rows."""

WIDEST = 8192
"""Inputs of a reader for which matrices of all pairs of them are made."""

ROUNDS = 16
"""A round of elimination takes one unit in so many away, at least one: 16 end where one at a time does."""


def gains(model: nn.Module, graph: ChannelGraph, inputs: ExampleInputs) -> Tensor:
    """The gain of each unit: the share of what its reader gives that it explains beyond the better units.

    Units of a group are eliminated worst first, with the weights of the reader fitted anew each time; the best n leave
    an error e(n). On the lower convex hull of e the n-th unit gains the fall of its segment, per unit, times the
    `relevance` of the reader. A threshold on gain per cost then is Lagrange's answer to which widths make the least
    error in all under a budget. Where there are few rows for the inputs of the reader, one factor for each unit is
    fitted instead, as in channel pruning (He, Zhang, Sun 2017, arXiv 1707.06168). Units with several readers, and those
    whose reader is no plain layer or has more than WIDEST inputs, gain their `contribution`.
    Shape (units,), at least 0, float64; flat in the order of `SizeModel`.

    Source: the optimal brain surgeon on structures and error curves of layers, as in ZipLM (Kurtic et al. 2023,
    arXiv 2302.04089); that each layer counts by its part in the residual stream is ours (docs/method.md).
    """
    with torch.no_grad(), evaluating(model), twinned(model):  # whose linear layers run as such, to be listened to
        return _gains(model, graph, inputs)


def _gains(model: nn.Module, graph: ChannelGraph, inputs: ExampleInputs) -> Tensor:
    matters = relevance(model, graph, inputs)
    found = list(contribution(model, graph, inputs, matters).split([group.units for group in graph.groups]))
    reads: dict[str, list[int]] = {}
    for i, group in enumerate(graph.groups):
        if len(group.readers) == 1:
            reads.setdefault(group.readers[0].tensor, []).append(i)

    def hear(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        read, given = rows_read(name, layer, x).float(), rows_given(name, layer, y).float()
        if read.shape[1] > WIDEST or not (read.isfinite().all() and given.isfinite().all()):
            return
        read, given, weight = read - read.mean(0), given - given.mean(0), model.get_parameter(name)
        for i in reads.pop(name, ()):  # a layer that runs twice is heard once
            positions = graph.groups[i].readers[0].positions
            columns = (positions.unsqueeze(2) * weight[0, 0].numel() + torch.arange(weight[0, 0].numel())).flatten(1)
            fitted = _weights if len(read) > ROWS * read.shape[1] else _factors
            order, errors = eliminate(*fitted(read, given, weight.flatten(1).float(), columns))
            found[i][order] = matters[name] * falls(errors)

    args, kwargs = as_call(inputs)
    with listening(linear_layers(model, list(reads)), hear):
        model(*args, **kwargs)
    return torch.cat(found) if found else torch.empty(0)


Problem = tuple[Tensor, Tensor, Tensor, Tensor]
"""What `eliminate` takes."""


def _weights(read: Tensor, given: Tensor, weight: Tensor, columns: Tensor) -> Problem:
    """All weights of the reader are fitted."""
    return (read.T @ read).double(), (read.T @ given).double(), given.double().square().sum(), columns


def _factors(read: Tensor, given: Tensor, weight: Tensor, columns: Tensor) -> Problem:
    """One factor for the old weights of each unit is fitted, since few rows could be met by weights of any sort.

    The inner product of what two units give is the sum over a block of (A^T A) * (W^T W).
    """
    chosen = columns.flatten().to(read.device)
    read, weight = read[:, chosen], weight[:, chosen]
    products = ((read.T @ read) * (weight.T @ weight)).double().unflatten(0, columns.shape).sum(1)
    products = products.unflatten(1, columns.shape).sum(2)
    return products, products.sum(1, keepdim=True), given.double().square().sum(), torch.arange(len(columns))[:, None]


def eliminate(hessian: Tensor, target: Tensor, total: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The units from the best to the worst, and the share of Y that the first n of them leave unexplained.

    `hessian` is A^T A, shape (inputs, inputs), `target` A^T Y, `total` |Y|^2. Row i of `columns`, shape (units, k),
    tells which inputs are those of unit i; the others stay. Returns shapes (units,) and (units + 1,). With
    H = A^T A + ridge and W = H^-1 A^T Y, the loss of the inputs S costs <W_S, (H^-1)_SS^-1 W_S>; both are updated for
    what is left.
    """
    hessian = hessian.clone()
    hessian.diagonal().add_(RIDGE * hessian.diagonal().mean().clamp_min(1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    weight = inverse @ target
    total = total.clamp_min(1e-12)
    errors = [float(1 - (target * weight).sum() / total)]
    order: list[int] = []
    place, alive = columns.to(hessian.device), torch.arange(len(columns))
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
