"""How much the output of each layer matters: its part in the sum that it enters, such as a residual stream."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from diffprune.sums import Summand, Watch
from surgery import ChannelGraph, ExampleInputs, as_call, evaluating


def relevance(model: nn.Module, graph: ChannelGraph, inputs: ExampleInputs) -> dict[str, float]:
    """Per weight of a layer the share that an error of its output has in what goes on from there, in [0, 1].

    A layer that enters a sum: Var(output) / Var(sum), totals over channels, at most 1. A layer that only one other
    reads: as that one, for its output serves nothing else. All others: 1.
    """
    owners: dict[Tensor, nn.Module] = {m.weight: m for m in model.modules() if isinstance(m, nn.Linear | _ConvNd)}
    # the last layer of attention is not called, but what attention gives is its output
    owners.update({m.out_proj.weight: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)})
    weights = dict(model.named_parameters())  # filters that are buffers are not among them
    layers = {
        layer.weight: owners[weight]
        for layer in graph.layers
        if (weight := weights.get(layer.weight)) is not None and weight in owners
    }
    shares: dict[str, float] = {}

    def entered(summand: Summand) -> None:
        axis = 1 if isinstance(layers[summand.layer], _ConvNd) else -1
        whole = _variance(summand.mine + summand.other, axis)
        shares[summand.layer] = min(1.0, _variance(summand.mine, axis) / max(whole, 1e-12))

    args, kwargs = as_call(inputs)
    with torch.no_grad(), evaluating(model), Watch(layers, entered).inside(model):
        model(*args, **kwargs)
    only_reader = _only_reader(graph)
    return {layer.weight: _followed(layer.weight, shares, only_reader) for layer in graph.layers}


def _variance(value: Tensor, axis: int) -> float:
    """Summed over channels, which lie on `axis`: 1 behind a convolution, the last one behind a linear layer."""
    rows = value.movedim(axis, 0).flatten(1)
    return float(rows.float().var(1, correction=0).sum())


def _only_reader(graph: ChannelGraph) -> dict[str, str]:
    """The layer that alone reads what a layer writes, where there is one."""
    found = {}
    for group in graph.groups:
        writers = [slot.tensor for slot in group.slots if slot.role == "write"]
        if len(group.readers) == 1:
            found.update({writer: group.readers[0].tensor for writer in writers if writer != group.readers[0].tensor})
    return found


def _followed(name: str, shares: Mapping[str, float], only_reader: Mapping[str, str]) -> float:
    seen: set[str] = set()
    while name not in shares:
        if name not in only_reader or name in seen:
            return 1.0
        seen.add(name)
        name = only_reader[name]
    return shares[name]
