"""Removing units physically, or masking them: the same function, in the same shapes or smaller ones."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import NotCopied
from surgery.graph import ChannelGraph, Keep

RECEIPT = "surgery_receipt"
"""The attribute of a cut network that holds its Receipt."""


@dataclass(frozen=True)
class Receipt:
    """What a cut left, per tensor: its dense shape and, per axis, the dense indices that were kept."""

    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, Mapping[int, tuple[int, ...]]]


def mask(model: nn.Module, graph: ChannelGraph, keep: Keep) -> nn.Module:
    """A copy of `model` in which every reader reads closed units as zero. Shapes stay. Raises BadKeep."""
    full = graph.complete(keep)
    masked = copied(model)
    tensors = dict(masked.named_parameters())
    with torch.no_grad():
        for group in graph.groups:
            closed = ~full[group.name]
            for slot in group.readers:
                weight = tensors[slot.tensor]
                weight.index_fill_(slot.axis, slot.positions[closed].reshape(-1).to(weight.device), 0)
    return masked


def cut(model: nn.Module, graph: ChannelGraph, keep: Keep) -> nn.Module:
    """A smaller copy of `model` without the closed units; it computes what `mask` does. Raises BadKeep.

    Each tensor is sliced once. dtype, device, memory format, mode, requires_grad, tied weights and hooks are kept;
    gradients are not. The result carries a Receipt for `surgery.save`.
    """
    alive = graph.kept(graph.complete(keep))
    kept: dict[str, dict[int, Tensor]] = {}
    for (tensor, axis), flags in alive.items():
        if not flags.all():
            kept.setdefault(tensor, {})[axis] = flags.nonzero().squeeze(1)
    small = copied(model)
    slice_(small, kept)
    setattr(small, RECEIPT, _compose(getattr(model, RECEIPT, None), model, kept))
    return small


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. Raises NotCopied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise NotCopied(
            f"{type(model).__name__} cannot be copied: {str(error).splitlines()[0] if str(error) else error!r}",
            at="surgery.cut or surgery.mask",
            effect="nothing was changed",
            fix="make copy.deepcopy of the model work: remove old weight norms, detach tensors kept as attributes",
        ) from error


def slice_(model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Keep only the given indices of each named tensor, in place, and set the sizes that layers remember."""
    tensors = states(model)
    touched = set()
    for name, axes in kept.items():
        old = tensors[name]
        new = old.detach()
        for axis, index in axes.items():
            new = new.index_select(axis, index.to(new.device))
        if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
            new = new.contiguous(memory_format=torch.channels_last)
        touched |= replace_(model, old, new)
    for module in touched:
        for kind, resize in RESIZE.items():
            if isinstance(module, kind):
                resize(module)


def states(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones once, by their first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def replace_(model: nn.Module, old: Tensor, new: Tensor) -> set[nn.Module]:
    """Put `new` wherever `old` is registered (tied weights: everywhere); returns the modules that changed."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    touched = set()
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for key, value in registry.items():
                if value is old:
                    registry[key] = new  # type: ignore[assignment]
                    touched.add(module)
    return touched


def _compose(before: Receipt | None, model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> Receipt:
    """The receipt of cutting again: indices always count in the dense network."""
    shapes = dict(before.shapes) if before else {}
    indices = {name: dict(axes) for name, axes in before.kept.items()} if before else {}
    tensors = states(model)
    for name, axes in kept.items():
        shapes.setdefault(name, tuple(tensors[name].shape))
        known = indices.setdefault(name, {})
        for axis, index in axes.items():
            old = known.get(axis)
            known[axis] = tuple(index.tolist() if old is None else (old[i] for i in index.tolist()))
    return Receipt(shapes, indices)


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
    norm.num_features = next(t for t in (norm.weight, norm.running_mean) if t is not None).shape[0]


def _resize_prelu(prelu: Any) -> None:
    prelu.num_parameters = prelu.weight.shape[0]


def _resize_embedding(embedding: Any) -> None:
    embedding.embedding_dim = embedding.weight.shape[1]


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
}
"""Layers that remember a size: how to read it off their weights again."""
