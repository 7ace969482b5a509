"""Removing units physically, or masking them: the same function, in the same shapes or smaller ones."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from surgery.errors import NotCopied
from surgery.graph import OVER, SOURCE, ChannelGraph, Keep
from surgery.norms import gate_norm_, is_gated, narrow_gate_, norm_units
from surgery.twins import twin_

GROUPS = ".groups"

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
    receipt = _compose(getattr(model, RECEIPT, None), {n: dense[n] for n in kept if n not in sizes}, kept, sizes)
    setattr(small, RECEIPT, receipt)
    return small


def _new_groups(model: nn.Module, small: nn.Module) -> dict[str, int]:
    """Of convolutions: from the shapes that several cuts leave together it could not be told."""
    before = {name: module.groups for name, module in model.named_modules() if isinstance(module, _ConvNd)}
    after = {name: module.groups for name, module in small.named_modules() if isinstance(module, _ConvNd)}
    return {f"{name}{GROUPS}": groups for name, groups in after.items() if before.get(name, groups) != groups}


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, with the objects of `memo` (by id) in place of the old. Raises NotCopied."""
    try:
        return copy.deepcopy(model, memo or {})
    except Exception as error:
        raise NotCopied(
            f"{type(model).__name__} cannot be copied: {str(error).splitlines()[0] if str(error) else error!r}",
            at="surgery.cut or surgery.mask",
            effect="nothing was changed",
            fix="make copy.deepcopy of the model work: remove old weight norms, detach tensors kept as attributes",
        ) from error


def rebuilt(
    model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]], sizes: Mapping[str, int], *, hollow: bool = False
) -> nn.Module:
    """A copy of `model` with only the given indices of each named tensor, and these sizes.

    The smaller tensors take the places of the old ones while the copy is made, wherever the network refers to them. A
    `hollow` copy shares all other parameters with `model`.
    """
    tensors = states(model)
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if hollow else {}
    for name in kept.keys() & tensors.keys():
        old = tensors[name]
        if hollow and isinstance(old, nn.Parameter):
            new = old.new_zeros(()).expand([len(kept[name].get(axis, range(n))) for axis, n in enumerate(old.shape)])
        else:
            new = sliced(old, kept[name])
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
        memo[id(old)] = new
    small = copied(model, memo)
    originals = dict(model.named_modules(remove_duplicate=False))
    changed = {name.rpartition(".")[0] for name in (*kept, *sizes)}
    around = {owner[:end] for owner in changed for end in _ends(owner)}
    for name, module in small.named_modules():
        if name in around:
            twin_(module, originals[name])
    _slice_orders(small, kept, tensors)
    for name, value in sizes.items():
        owner, _, attribute = name.rpartition(".")
        _remember(small.get_submodule(owner), attribute, value)
    for name in changed:
        _remember_sizes(small.get_submodule(name) if name in originals else small)
    for name in sizes:
        if name.endswith(GROUPS):
            _regroup_(small.get_submodule(name.removesuffix(GROUPS)), sizes[name])
    return small


def _ends(name: str) -> list[int]:
    """Where the names of a module and of all modules around it end."""
    return [0, *(i for i, letter in enumerate(name) if letter == "."), len(name)]


def _remember(module: nn.Module, attribute: str, value: int) -> None:
    """Set an integer, the only entry of a list, or the entry `[i]` of one."""
    attribute, _, index = attribute.removesuffix("]").partition("[")
    was = getattr(module, attribute)
    if isinstance(was, tuple | list):
        entries = list(was)
        entries[int(index or 0)] = value
        setattr(module, attribute, was._make(entries) if hasattr(was, "_make") else type(was)(entries))
    else:
        setattr(module, attribute, value)


def sliced(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """Only these indices along these axes; whatever order of the axes the memory had, it has again."""
    if not axes:
        return tensor
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    new = tensor.detach().permute(order)
    for axis, index in axes.items():
        new = new.index_select(order.index(axis), index.to(new.device))
    return new.permute([order.index(axis) for axis in range(tensor.dim())])


def _slice_orders(small: nn.Module, kept: Mapping[str, Mapping[int, Tensor]], done: Mapping[str, Tensor]) -> None:
    """Buffers of indices: those of twins are sliced here, and all count the channels that are left."""
    buffers = dict(small.named_buffers())
    for name, axes in kept.items():
        owner, _, attribute = name.rpartition(".")
        if name in buffers and name not in done:
            buffers[name] = sliced(buffers[name], axes)
            small.get_submodule(owner).register_buffer(attribute, buffers[name])
    for name, axes in kept.items():
        if name.endswith(SOURCE):
            order = buffers[name.removesuffix(SOURCE)]
            order.copy_(torch.searchsorted(axes[0].to(order.device), order))


def _remember_sizes(module: nn.Module) -> None:
    for kind, resize in RESIZE.items():
        if isinstance(module, kind):
            resize(module)


def states(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones once, by their first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _compose(
    before: Receipt | None,
    dense: Mapping[str, tuple[int, ...]],
    kept: Mapping[str, Mapping[int, Tensor]],
    sizes: Mapping[str, int],
) -> Receipt:
    """The receipt of cutting again: indices always count in the dense network."""
    shapes = dict(before.shapes) if before else {}
    indices = {name: dict(axes) for name, axes in before.kept.items()} if before else {}
    for name, shape in dense.items():
        shapes.setdefault(name, shape)
        known = indices.setdefault(name, {})
        for axis, index in kept[name].items():
            old = known.get(axis)
            known[axis] = tuple(index.tolist() if old is None else (old[i] for i in index.tolist()))
    return Receipt(shapes, indices, {**(before.sizes if before else {}), **sizes})


def _regroup_(conv: Any, groups: int) -> None:
    first, second = conv.weight.shape[:2]
    conv.groups = groups
    widths = (first, second * groups) if conv.transposed else (second * groups, first)
    conv.in_channels, conv.out_channels = widths


def _resize_conv(conv: Any) -> None:
    out, per_group = conv.weight.shape[:2]
    if conv.groups > 1 and conv.in_channels == conv.groups:  # depthwise: one group per input channel
        conv.groups = out // (conv.out_channels // conv.groups)
    conv.in_channels, conv.out_channels = per_group * conv.groups, out


def _resize_transposed(conv: Any) -> None:
    ins, per_group = conv.weight.shape[:2]
    if conv.groups > 1:
        conv.groups = ins
    conv.in_channels, conv.out_channels = ins, per_group * conv.groups


def _resize_linear(linear: Any) -> None:
    linear.out_features, linear.in_features = linear.weight.shape


def _resize_norm(norm: Any) -> None:
    known = next((t for t in (norm.weight, norm.running_mean) if t is not None), None)
    norm.num_features = norm.num_features if known is None else known.shape[0]


def _resize_prelu(prelu: Any) -> None:
    prelu.num_parameters = prelu.weight.shape[0]


def _resize_embedding(embedding: Any) -> None:
    embedding.embedding_dim = embedding.weight.shape[1]


def _resize_rnn(rnn: Any) -> None:
    rnn.flatten_parameters()


RESIZE: dict[type[nn.Module], Callable[[Any], None]] = {
    nn.Conv1d: _resize_conv,
    nn.Conv2d: _resize_conv,
    nn.Conv3d: _resize_conv,
    nn.ConvTranspose1d: _resize_transposed,
    nn.ConvTranspose2d: _resize_transposed,
    nn.ConvTranspose3d: _resize_transposed,
    nn.Linear: _resize_linear,
    nn.modules.batchnorm._NormBase: _resize_norm,
    nn.PReLU: _resize_prelu,
    nn.Embedding: _resize_embedding,
    nn.RNNBase: _resize_rnn,
}
"""Layers that remember a size: how to read it off their weights again."""
