"""Units that nobody reads any more, as a search over single weights leaves them behind."""

import torch
from torch import Tensor, nn

from surgery.graph import ChannelGraph, Slot


def unread(model: nn.Module, graph: ChannelGraph) -> dict[str, Tensor]:
    """A keep without the units whose readers' weights are all zero: `cut` with it changes nothing that is computed.

    What only such units read is unread in turn. One unit stays in a group through which all of the output goes. Units
    in the statistics of a norm over the width are read by it, and stay.
    """
    weights = {name: p.detach() != 0 for name, p in model.named_parameters()}
    keep = {group.name: torch.ones(group.units, dtype=torch.bool) for group in graph.groups}
    while True:
        alive = graph.kept(keep)
        found = dict(keep)
        for group in graph.groups:
            if group.readers and not group.norms:
                reads = torch.stack([_reads(weights[slot.tensor], slot, alive) for slot in group.readers]).any(0)
                first = torch.arange(group.units) == 0
                found[group.name] = reads if reads.any() or group.droppable else first
        if all(torch.equal(found[name], keep[name]) for name in keep):
            return keep
        keep = found


def _reads(weight: Tensor, slot: Slot, alive: dict[tuple[str, int], Tensor]) -> Tensor:
    """Per unit, does a weight of what is `alive` read it? Shape (units,)."""
    for axis in range(weight.dim()):
        flags = alive.get((slot.tensor, axis))
        if axis != slot.axis and flags is not None:
            weight = weight.index_select(axis, flags.nonzero().squeeze(1).to(weight.device))
    read = weight.movedim(slot.axis, 0).flatten(1).any(1).cpu()
    return read[slot.positions].any(1)
