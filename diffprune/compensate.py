"""After a cut: the layers of the small network fitted to what they gave in the dense one, by least squares."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from diffprune.errors import BadData
from diffprune.readings import linear_layers, listening, rows_given, rows_read
from diffprune.recover import averaging
from surgery import ChannelGraph, evaluating

RIDGE = 0.01
"""Pull towards the old weights, as a share of the mean variance of what a layer reads."""


def compensate_(
    small: nn.Module, parent: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor], x: Tensor
) -> None:
    """Fit the weights of a cut network, layer by layer in the order of its forward, without labels or gradients.

        W = W0 + (Y - A W0)^T A (A^T A + l I)^-1       l = RIDGE * mean of the diagonal of A^T A

    A is what a layer of the cut network reads at sampled places of the images `x`, of shape (N, ...), Y what the same
    layer gives in `parent` there; both are centred, since a bias or the next normalisation takes the mean. All happens
    in one forward of each network: when a layer of the cut one runs, those before it are fitted already, and its
    BatchNorm statistics are those of `x`. Plain linear layers and convolutions of one group are fitted; others, and
    frozen ones, stay.

    Raises BadData for values that are not finite.

    Source: optimal brain surgeon in closed form for layers (Dong, Chen, Pan 2017, arXiv 1705.07565; structured in
    ZipLM, Kurtic et al. 2023, arXiv 2302.04089).
    """
    layers = linear_layers(small, [layer.weight for layer in graph.layers])
    layers = {name: layer for name, layer in layers.items() if small.get_parameter(name).requires_grad}
    alive = graph.checked(keep)[1]
    wanted: dict[str, list[Tensor]] = {}

    def remember(name: str, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        rows = rows_given(name, layer, outputs)
        kept = alive.get((name, 0))
        wanted.setdefault(name, []).append(rows if kept is None else rows[:, kept.to(rows.device)])

    with torch.no_grad(), evaluating(parent), listening(linear_layers(parent, layers), remember):
        parent(x)

    def fit(layer: nn.Module, name: str, inputs: Tensor) -> None:
        if len(wanted.get(name, [])) == 1:  # a layer that runs twice has two targets
            read, given = rows_read(name, layer, inputs), wanted.pop(name)[0]
            if not (read.isfinite().all() and given.isfinite().all()):
                raise BadData(
                    "the images give values that are not finite",
                    at=f"fitting {name.removesuffix('.weight')} after the cut",
                    effect="the run was stopped",
                    fix="look for values that are not finite in the data",
                )
            _fit_(layer, read, given)

    with ExitStack() as hooks, averaging(small):
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda layer, args, name=name: fit(layer, name, args[0]))
            hooks.enter_context(hook)
        small(x)


def _fit_(layer: nn.Module, read: Tensor, wanted: Tensor) -> None:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    old = weight.flatten(1).double()
    read, wanted = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (read, wanted))
    mean, target = read.mean(0), wanted.mean(0)
    read, wanted = read - mean, wanted - target
    missing = wanted - read @ old.to(read).T
    ridge = RIDGE * read.square().mean(0).mean().clamp_min(1e-12).double() * len(read)
    # Products in float32 are enough with a ridge; the system is solved in double, for it may be near singular.
    if len(read) > read.shape[1]:
        step = _solved((read.T @ read).double(), ridge, (read.T @ missing).double())
    else:  # the same by the smaller matrix
        step = read.T.double() @ _solved((read @ read.T).double(), ridge, missing.double())
    new = old + step.T
    weight.copy_(new.view_as(weight))
    if bias is not None:
        bias.copy_(target - new @ mean.double())


def _solved(gram: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """(gram + ridge * I)^-1 right, for a positive gram, which is overwritten."""
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
