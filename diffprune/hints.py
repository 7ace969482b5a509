"""Hints: while it recovers, each layer of a cut network is shown what the same layer reads in its dense parent."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffprune.readings import fixed_rows, linear_layers, read_by
from surgery import ChannelGraph

Read = dict[str, list[Tensor]]


def hinted(graph: ChannelGraph) -> list[str]:
    """The weights of layers that hints are for: those that read what others read as well, such as a residual stream.

    Inside of a block the few channels that are left may well find other uses, and end 0.1 to 0.2 points higher
    (docs/experiments.md). Where each layer alone reads what it reads, all are hinted.
    """
    shared = {slot.tensor for group in graph.groups if len(group.readers) > 1 for slot in group.readers}
    weights = fixed_rows(graph)
    return [weight for weight in weights if weight in shared] or weights


@contextmanager
def hinting(
    small: nn.Module, parent: nn.Module, weights: Iterable[str], alive: Mapping[tuple[str, int], Tensor]
) -> Iterator[Callable[[], Tensor]]:
    """Inside, each call gives how far the last forward of `small` was from that of `parent`, as a scalar to be trained.

        mean over layers of log(1 + d)        d = |x_small - x_parent[kept]|^2 / (Var(x_parent[kept]) * numel)

    The logarithm is d itself where both are close, and lets no layer that is far off take over. The variance is that of
    the first call, since to take it costs more than the rest.
    x is what a plain linear layer or convolution of the network reads; of `weights`, the ones with such an owner count.
    `alive` tells per (weight, 1) which of the channels that the layer reads are kept, as `ChannelGraph.checked` does.
    Source: FitNets (Romero et al. 2015, arXiv 1412.6550). A cut network needs no regressor between the two, since its
    channels are channels of the parent.
    """
    layers = linear_layers(parent, weights)
    kept = {name: flags.nonzero().squeeze(1) for name in layers if (flags := alive.get((name, 1))) is not None}
    theirs: Read = {}
    ours: Read = {}
    variance: dict[str, Tensor] = {}

    def far(name: str, mine: Tensor, wanted: Tensor) -> Tensor:
        if name in kept:
            axis = 1 if isinstance(layers[name], nn.Conv2d) else -1
            wanted = wanted.index_select(axis, kept[name].to(wanted.device))
        if name not in variance:
            variance[name] = wanted.float().var().clamp_min(1e-12)
        return (F.mse_loss(mine, wanted) / variance[name]).log1p()

    def distance() -> Tensor:
        pairs = [
            far(name, mine, wanted)
            for name in layers
            for mine, wanted in zip(ours.pop(name, ()), theirs.pop(name, ()), strict=False)  # one may skip layers
        ]
        return torch.stack(pairs).mean() if pairs else torch.zeros(())

    with ExitStack() as hooks:
        for model, read in ((parent, theirs), (small, ours)):
            for name, layer in linear_layers(model, layers).items():
                hooks.enter_context(layer.register_forward_pre_hook(_remember(read, name), with_kwargs=True))
        yield distance


def _remember(read: Read, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.setdefault(name, []).append(read_by(args, kwargs))

    return hook
