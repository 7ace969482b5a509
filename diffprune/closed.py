"""A branch that was closed stays closed while the rest of the network recovers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from surgery import ChannelGraph


@contextmanager
def staying_closed(small: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, layers that read nothing but closed branches are neither fitted nor trained: their weights stay zero.

    One unit of such a branch is left where shapes must not be empty. Trained, it would come alive and cost as much time
    as several; at zero, the ONNX file goes without the branch (`export.to_onnx`) and only the layer's bias remains.
    """
    emptied = [group for group in graph.groups if not keep[group.name].any()]
    weights = {slot.tensor: small.get_parameter(slot.tensor) for group in emptied for slot in group.readers}
    frozen = [weight for weight in weights.values() if weight.requires_grad and not weight.any()]
    for weight in frozen:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(True)
