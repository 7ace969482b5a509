"""Which units share a gate: each has its own, unless bundles are given, such as whole residual branches."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from surgery import ChannelGraph, SizeModel

Bundle = Mapping[str, Tensor]
"""Units that open and close together: per group name a boolean tensor of shape (units,), True where they belong."""


def branches(graph: ChannelGraph) -> list[Bundle]:
    """One bundle for each width that may be closed as a whole: its gate drops a residual branch."""
    return [{g.name: torch.ones(g.units, dtype=torch.bool)} for g in graph.groups if g.droppable]


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
