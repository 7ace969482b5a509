"""Our groups as those of torch-pruning, so that its importance criteria score them.

torch-pruning's own search for groups is not asked, so its criteria serve networks that it cannot follow, too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import Dependency, Group, Node
from torch_pruning.ops import OPTYPE, module2type

from surgery.graph import ChannelGraph, ChannelGroup, Slot

Criterion = Callable[[Any], Tensor | None]
"""An importance of torch-pruning: a score per channel of a Group's root, or None if it scores no member."""


def importance(model: nn.Module, graph: ChannelGraph, criterion: Criterion) -> dict[str, Tensor]:
    """Per group of `graph` the score of each unit by `criterion`, shape (units,): the mean over its root channels.

    A group of which the criterion scores no member, such as BNScaleImportance without a batch norm, is left out.
    Gradients are the caller's business: TaylorImportance reads those that the parameters have and fails without;
    HessianImportance, as it always does, writes what it has accumulated over them. All else of the model is unchanged.
    What a criterion raises is passed on: FPGMImportance fails where a grouped convolution reads the channels.
    """
    found = {}
    for name, (group, places) in _laid_out(model, graph).items():
        scores = criterion(group)
        if scores is not None:
            found[name] = scores[places].mean(1)
    return found


def torch_pruning_groups(model: nn.Module, graph: ChannelGraph) -> dict[str, Group]:
    """Per group of `graph` a Group of torch-pruning over the same channels, to be scored but not pruned.

    The root comes first: the first convolution or linear layer that writes the channels, else the first that reads
    them. `idxs` are the positions of the slot, in a grouped convolution those in all its input channels; `root_idxs`
    count the places in `idxs` of the root. Both are in the order of `idxs`, because some criteria sort these alone.
    Where a unit has another number of positions than in the root, they are dealt out to its root channels in order.
    Sizes of modules and buffers have no item; a bias belongs to the item of its layer.
    """
    return {name: group for name, (group, _) in _laid_out(model, graph).items()}


@dataclass(frozen=True, eq=False)
class _Member:
    """What one layer or bare parameter loses: `positions`, shape (units, k), as `handler` counts them."""

    slot: Slot
    layer: Any
    handler: Any
    positions: Tensor

    def rank(self) -> int:
        """How well it serves as the root: all criteria look at convolutions and linear layers."""
        return 2 * (self.handler in OUTWARD) + (self.handler in INWARD)

    def node(self) -> Any:
        node = Node(self.layer, grad_fn=None, name=self.slot.tensor)
        if isinstance(self.layer, nn.Parameter):
            node.pruning_dim = self.slot.axis
        return node


def _laid_out(model: nn.Module, graph: ChannelGraph) -> dict[str, tuple[Any, Tensor]]:
    """Per name the Group and, shape (units, k), where the channels of each unit lie in its root."""
    parameters = dict(model.named_parameters())
    found = {}
    for group in graph.groups:
        members = _members(group, model, parameters)
        root = max(members, key=_Member.rank)
        places = root.positions.flatten().argsort().argsort().view_as(root.positions)
        others = [member for member in members if member is not root]
        others.sort(key=lambda member: member.positions.shape != places.shape)  # scores are as long as the first
        found[group.name] = _group([root, *others], places), places
    return found


def _members(group: ChannelGroup, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[_Member]:
    found = []
    for slot in (slot for slot in group.slots if slot.tensor in parameters):
        owner, _, attribute = slot.tensor.rpartition(".")
        layer = model.get_submodule(owner)
        row = HANDLERS.get(module2type(layer), {})
        if attribute == "weight" and slot.axis in row:
            found.append(_in_layer(slot, layer, row))
        elif attribute != "bias" or not row:
            found.append(_Member(slot, parameters[slot.tensor], tp.prune_parameter_out_channels, slot.positions))
    return found


def _in_layer(slot: Slot, layer: Any, row: Mapping[int, Any]) -> _Member:
    swapped = getattr(layer, "transposed", False) and len(row) == 2
    handler, positions = row[1 - slot.axis if swapped else slot.axis], slot.positions
    if handler == tp.prune_conv_in_channels and layer.groups > 1 and not layer.transposed:
        starts = layer.weight.shape[1] * torch.arange(layer.groups)
        positions = (starts[:, None] + positions[:, None]).flatten(1)
    return _Member(slot, layer, handler, positions)


def _group(members: list[_Member], places: Tensor) -> Any:
    group, root, width = Group(), members[0], places.shape[1]
    source = root.node()
    for member in members:
        count = member.positions.shape[1]
        roots = places[:, torch.arange(count) * width // count].flatten()
        idxs, order = member.positions.flatten().sort()
        target = source if member is root else member.node()
        group.add_dep(Dependency(root.handler, member.handler, source, target), idxs.tolist())
        group[-1].root_idxs = roots[order].tolist()
    return group


HANDLERS: dict[OPTYPE, dict[int, Any]] = {
    OPTYPE.CONV: {0: tp.prune_conv_out_channels, 1: tp.prune_conv_in_channels},
    OPTYPE.DEPTHWISE_CONV: {0: tp.prune_depthwise_conv_out_channels},
    OPTYPE.LINEAR: {0: tp.prune_linear_out_channels, 1: tp.prune_linear_in_channels},
    OPTYPE.BN: {0: tp.prune_batchnorm_out_channels},
    OPTYPE.IN: {0: tp.prune_instancenorm_out_channels},
    OPTYPE.GN: {0: tp.prune_groupnorm_out_channels},
    OPTYPE.LN: {0: tp.prune_layernorm_out_channels},
    OPTYPE.PRELU: {0: tp.prune_prelu_out_channels},
    OPTYPE.EMBED: {1: tp.prune_embedding_out_channels},
}
"""Per kind of layer and axis of its weight what torch-pruning would call; transposed convolutions swap both axes."""

OUTWARD = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
INWARD = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
