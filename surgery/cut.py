"""Removing units physically, or masking them: the same function, in the same shapes or smaller ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from surgery.graph import OVER, SOURCE, ChannelGraph, Keep
from surgery.norms import gate_norm_, is_gated, narrow_gate_, norm_units
from surgery.rebuilding import GROUPS, copied, rebuilt, without_caches_

RECEIPT = "surgery_receipt"
"""The attribute of a cut network that holds its Receipt."""


@dataclass(frozen=True)
class Receipt:
    """What a cut left: per tensor its dense shape and, per axis, the dense indices that were kept; and new sizes.

    `sizes` gives what modules remember now, by qualified name of the attribute. The channels that a buffer of indices
    counts are listed as one more tensor, its name followed by SOURCE.
    """

    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, Mapping[int, tuple[int, ...]]]
    sizes: Mapping[str, int] = field(default_factory=dict)


def mask(model: nn.Module, graph: ChannelGraph, keep: Keep) -> nn.Module:
    """A copy of `model` in which every reader reads closed units as zero and no norm counts them. Shapes stay.

    Raises BadKeep.
    """
    full = graph.complete(keep)
    masked = copied(model)
    mask_(masked, graph, full)
    return masked


def mask_(model: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor]) -> None:
    """`mask` in place. `keep` must be complete."""
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for group in graph.groups:
            closed = ~keep[group.name]
            for slot in group.readers:
                weight = tensors[slot.tensor]
                weight.index_fill_(slot.axis, slot.positions[closed].reshape(-1).to(weight.device), 0)
    flat = torch.cat([*(keep[g.name] for g in graph.groups), torch.ones(1, dtype=torch.bool)])
    device = next((p.device for p in model.parameters()), None)
    for name, units in norm_units(graph).items():
        if not flat[units].all():
            gate_norm_(model.get_submodule(name), flat[units].float().to(device))
    without_caches_(model)


def cut(model: nn.Module, graph: ChannelGraph, keep: Keep) -> nn.Module:
    """A smaller copy of `model` without the closed units; it computes what `mask` does. Raises BadKeep.

    Each tensor is sliced once. Where a whole branch is closed, one channel stays in it that nobody reads. dtype,
    device, memory format, mode, requires_grad, tied weights and hooks are kept; gradients are not. The result carries a
    Receipt for `surgery.save`.
    """
    full, alive = graph.checked(keep)
    small = cut_to(model, graph, alive)
    _silence_(small, graph, full, alive)
    return small


def _silence_(
    small: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor], alive: Mapping[tuple[str, int], Tensor]
) -> None:
    """What a cut left of an emptied width, one unit, is read as zero: the branch gives what its biases give."""
    tensors = dict(small.named_parameters())
    for group in graph.groups:
        if not keep[group.name].any():
            for slot in group.readers:
                kept = alive[slot.tensor, slot.axis].nonzero().squeeze(1)
                left = torch.isin(kept, slot.positions[0]).nonzero().squeeze(1)
                with torch.no_grad():
                    tensors[slot.tensor].index_fill_(slot.axis, left.to(tensors[slot.tensor].device), 0)


def cut_to(
    model: nn.Module, graph: ChannelGraph, alive: Mapping[tuple[str, int], Tensor], *, hollow: bool = False
) -> nn.Module:
    """`cut` to what survives along each axis. A `hollow` one has the right shapes and zeros in the sliced weights."""
    kept: dict[str, dict[int, Tensor]] = {}
    for (tensor, axis), flags in alive.items():
        if not flags.all() and not tensor.endswith(OVER):
            kept.setdefault(tensor, {})[axis] = flags.nonzero().squeeze(1)
    sizes = {name: len(axes[0]) for name, axes in kept.items() if name in graph.sizes and not name.endswith(SOURCE)}
    small = rebuilt(model, {name: axes for name, axes in kept.items() if name not in sizes}, sizes, hollow=hollow)
    for name in sizes:
        module = small.get_submodule(name.rpartition(".")[0])
        if is_gated(module):
            narrow_gate_(module, kept[name][0])
    dense = {**graph.shapes, **graph.buffers, **{name: (n,) for name, n in graph.sizes.items()}}
    sizes |= _new_groups(model, small)
    without_caches_(small)
    before = getattr(model, RECEIPT, Receipt({}, {}))
    setattr(small, RECEIPT, _compose(before, {n: dense[n] for n in kept if n not in sizes}, kept, sizes))
    return small


def _new_groups(model: nn.Module, small: nn.Module) -> dict[str, int]:
    """Of convolutions: from the shapes that several cuts leave together it could not be told."""
    before = {name: module.groups for name, module in model.named_modules() if isinstance(module, _ConvNd)}
    after = {name: module.groups for name, module in small.named_modules() if isinstance(module, _ConvNd)}
    return {f"{name}{GROUPS}": groups for name, groups in after.items() if before.get(name, groups) != groups}


def _compose(
    before: Receipt,
    dense: Mapping[str, tuple[int, ...]],
    kept: Mapping[str, Mapping[int, Tensor]],
    sizes: Mapping[str, int],
) -> Receipt:
    """The receipt of cutting again: indices always count in the dense network."""
    shapes = dict(before.shapes)
    indices = {name: dict(axes) for name, axes in before.kept.items()}
    for name, shape in dense.items():
        shapes.setdefault(name, shape)
        known = indices.setdefault(name, {})
        for axis, index in kept[name].items():
            old = known.get(axis)
            known[axis] = tuple(index.tolist() if old is None else (old[i] for i in index.tolist()))
    return Receipt(shapes, indices, {**before.sizes, **sizes})
