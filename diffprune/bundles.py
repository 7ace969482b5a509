"""Which units share a gate: each has its own, unless bundles are given, such as whole residual branches."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from surgery import ChannelGraph, ChannelGroup, SizeModel, Slot

Bundle = Mapping[str, Tensor]
"""Units that open and close together: per group name a boolean tensor of shape (units,), True where they belong."""

Bundles = Iterable[Bundle] | Callable[[ChannelGraph], Iterable[Bundle]]
"""Several, or what finds them, such as `branches`."""


def branches(graph: ChannelGraph) -> list[Bundle]:
    """One bundle for each residual branch: its gate drops it, with all widths that lead only to its last one."""
    found: list[list[ChannelGroup]] = []
    for group in reversed(graph.groups):  # those that compute later come first
        if group.droppable and not any(group in branch for branch in found):
            found.append([group, *leading_to(group, graph)])
    return [{g.name: torch.ones(g.units, dtype=torch.bool) for g in branch} for branch in reversed(found)]


def leading_to(last: ChannelGroup, graph: ChannelGraph) -> list[ChannelGroup]:
    """The droppable groups that are read for nothing but `last`, and so go with it."""
    gone = [last]
    for group in reversed(graph.groups):
        written = {slot.tensor for g in gone for slot in g.slots if _all_of(slot, graph)}
        if group.droppable and group is not last and {slot.tensor for slot in group.readers} <= written:
            gone.append(group)
    return gone[1:]


def _all_of(slot: Slot, graph: ChannelGraph) -> bool:
    """The group writes every channel of that layer."""
    return slot.role == "write" and slot.positions.numel() == graph.length(slot.tensor, slot.axis)


def gate_of(graph: ChannelGraph, bundles: Iterable[Bundle]) -> Tensor:
    """The index of the gate of each unit, shape (units,).

    Raises ValueError for a unit in two bundles and for an empty one, surgery.BadKeep for unknown groups, wrong shapes,
    and a bundle without which nothing would reach the output.
    """
    owner, size = torch.arange(graph.units), SizeModel(graph)
    taken = torch.zeros(graph.units, dtype=torch.bool)
    for bundle in bundles:
        flags = ~size.flat({name: ~torch.as_tensor(units) for name, units in bundle.items()})
        if not flags.any() or (flags & taken).any():
            raise ValueError(f"the bundle over {', '.join(bundle) or 'nothing'} is empty or shares units with another")
        owner[flags] = int(flags.nonzero()[0])
        taken |= flags
    gates: Tensor = owner.unique(return_inverse=True)[1]
    return gates
