"""Copies of a network in which some tensors are smaller, and every layer knows its new sizes."""

import copy
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import NotCopied, first_line
from surgery.graph import SOURCE
from surgery.twins import twin_

GROUPS = ".groups"
"""Ends the name of the number of groups of a convolution, among the sizes that modules remember."""


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, with the objects of `memo` (by id) in place of the old. Raises NotCopied."""
    try:
        return copy.deepcopy(model, memo or {})
    except Exception as error:
        raise NotCopied(
            f"{type(model).__name__} cannot be copied: {first_line(error)}",
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


def without_caches_(model: nn.Module) -> None:
    """Modules with a `train` of their own make or drop there what they compute once (LeViT its attention biases): anew,
    from the weights that they have now. Modes stay."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        for module, training in modes:
            if type(module).train is not nn.Module.train:
                module.train(not training)
                module.train(training)
    for module, training in modes:
        module.training = training


def _ends(name: str) -> list[int]:
    """Where the names of a module and of all modules around it end."""
    return [0, *(i for i, letter in enumerate(name) if letter == "."), len(name)]


def _remember(module: nn.Module, attribute: str, value: int) -> None:
    """Set an integer, the only entry of a list, or the entry `[i]` of one. Raises KeyError where none is."""
    attribute, _, index = attribute.removesuffix("]").partition("[")
    was = getattr(module, attribute)
    entries = list(was) if isinstance(was, tuple | list) else [was]
    place = int(index or 0)
    if not isinstance(entries[place], Integral):
        raise KeyError(f"{attribute} of {type(module).__name__} is no size")
    entries[place] = value
    if isinstance(was, tuple | list):
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
