"""What each ATen operator does to the names of channels: one row per operator.

An operator without a row pins what it touches, with its name as the reason. Nothing is guessed.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from surgery.names import NEUTRAL, dense, together, varying

if TYPE_CHECKING:
    from surgery.observe import Call

Rule = Callable[..., Any]


class CannotFollow(Exception):
    """The rule of an operator does not cover this use of it; the text is the reason for pinning."""


# -- layers -----------------------------------------------------------------------------------------------------------


def convolution(call: "Call", x: Tensor, weight: Any, bias: Any = None, *rest: Any) -> Tensor:
    """Reads axis 1 of `weight` (out, in / groups, *kernel), writes axis 0. Depthwise: carries axis 0."""
    weight, groups = call.parameter(weight), _argument(rest, call, 3, "groups", 1)
    axis = 1 if x.dim() == len(weight.shape) else 0
    names = call.vector(x, axis)
    out, per_group = weight.shape[0], weight.shape[1]
    if groups == 1:
        call.read(weight, 1, names)
        written = call.write(weight, 0)
    elif per_group == 1:
        _grouped_by_module(call, weight, names)
        written = names.repeat_interleave(out // groups)
        call.carry(weight, 0, written)
    else:
        _grouped_by_module(call, weight, names)
        read = names.view(groups, per_group)
        call.names.tie(read, read[:1])
        call.read(weight, 1, read[0])
        written = call.names.fresh(out // groups).repeat(groups)
        call.write(weight, 0, written)
    call.carry(bias, 0, written)
    call.count(weight, outputs_per_channel=call.shape.numel() / out)
    return call.spread(written, axis)


def transposed_convolution(call: "Call", x: Tensor, weight: Any, bias: Any = None, *rest: Any) -> Tensor:
    """Reads axis 0 of `weight` (in, out / groups, *kernel), writes axis 1. Depthwise: carries axis 0."""
    weight, groups = call.parameter(weight), _argument(rest, call, 3, "groups", 1)
    axis = 1 if x.dim() == len(weight.shape) else 0
    names = call.vector(x, axis)
    if groups == 1:
        call.read(weight, 0, names)
        written = call.write(weight, 1)
    elif groups == weight.shape[0]:
        _grouped_by_module(call, weight, names)
        written = names.repeat_interleave(weight.shape[1])
        call.carry(weight, 0, names)
    else:
        raise CannotFollow("grouped transposed convolution")
    call.carry(bias, 0, written)
    call.count(weight, outputs_per_channel=x.numel() / weight.shape[0])
    return call.spread(written, axis)


def linear(call: "Call", x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """Reads axis 1 of `weight` (out, in), writes axis 0."""
    weight = call.parameter(weight)
    call.read(weight, 1, call.vector(x, x.dim() - 1))
    written = call.write(weight, 0)
    call.carry(bias, 0, written)
    call.count(weight, outputs_per_channel=call.shape.numel() / weight.shape[0])
    return call.spread(written, len(call.shape) - 1)


def embedding(call: "Call", weight: Any, index: Tensor, *_: Any) -> Tensor:
    """Writes axis 1 of `weight` (entries, channels)."""
    return call.spread(call.write(call.parameter(weight), 1), len(call.shape) - 1)


def per_channel_norm(call: "Call", x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, *_: Any) -> Tensor:
    """Batch and instance norm: every statistic and scale belongs to one channel of axis 1."""
    names = call.vector(x, 1)
    for vector in (weight, bias, mean, variance):
        call.carry(vector, 0, names)
    return x


def prelu(call: "Call", x: Tensor, weight: Any) -> Tensor:
    if call.parameter(weight).shape != (1,):
        call.carry(weight, 0, call.vector(x, 1 if x.dim() > 1 else 0))
    return x


# -- operators without parameters -------------------------------------------------------------------------------------


def elementwise(call: "Call", *args: Any, **kwargs: Any) -> Tensor:
    """Ties the names that meet. What is broadcast over channels serves all of them, so it is pinned, not tied."""
    operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    whole = [names.expand(call.shape) for names in operands if not _is_broadcast(call, names, operands)]
    return together(lambda *parts: _meet(call, parts), whole) if whole else call.neutral()


def arithmetic(call: "Call", *args: Any, **kwargs: Any) -> Tensor:
    """Element-wise with numbers, which may have been computed from the number of channels."""
    result = elementwise(call, *args, **kwargs)
    numbers = [str(a) for a in args if isinstance(a, int | float)]
    if numbers and varying(result):
        call.suspect(result, f"meets the number {', '.join(numbers)}")
    return result


def _is_broadcast(call: "Call", names: Tensor, operands: list[Tensor]) -> bool:
    """Is `names` repeated along an axis in which the channels of another operand differ?"""
    rank = len(call.shape)
    channel_axes = {axis - other.dim() + rank for other in operands for axis in varying(other)}
    missing = set(range(rank - names.dim())) | {a + rank - names.dim() for a, n in enumerate(names.shape) if n == 1}
    repeated = {axis for axis in missing & channel_axes if call.shape[axis] > 1}
    if repeated:
        call.names.pin(names, f"{call.name} at {call.where} broadcasts it over other channels")
    return bool(repeated)


def _meet(call: "Call", parts: tuple[Tensor, ...]) -> Tensor:
    result = parts[0]
    for part in parts[1:]:
        call.names.tie(result, part)
        result = torch.where(result == NEUTRAL, part, result)
    if len(parts) > 1 and any((part == NEUTRAL).any() for part in parts):
        call.suspect(result, "meets a constant made in the forward, as wide as the channels")
    return result


def movement(call: "Call", *args: Any, **kwargs: Any) -> Any:
    """Moves data without computing: run on the names as it is."""
    return call.run(*args, **kwargs)


def reshape(call: "Call", x: Tensor, shape: list[int]) -> Tensor:
    """A view. Whether a size that it spells out follows the channels must be proven on a cut network."""
    result = x.reshape(call.shape)
    axes = varying(result)
    if len(axes) > 1 and len(varying(x)) == 1:
        raise CannotFollow(f"to {tuple(shape)} splits the channels over several axes")
    if any(shape[axis] != -1 for axis in axes):
        call.suspect(result, f"to {tuple(shape)} spells out the number of channels")
    return result


def expand(call: "Call", x: Tensor, shape: list[int], **_: Any) -> Tensor:
    result = x.expand(call.shape)
    if any(shape[axis] != -1 for axis in varying(result)):
        call.suspect(result, f"to {tuple(shape)} spells out the number of channels")
    return result


def unflatten(call: "Call", x: Tensor, axis: int, sizes: Any) -> Tensor:
    if axis % x.dim() in varying(x):
        raise CannotFollow(f"to {tuple(sizes)} splits the channels over several axes")
    return x.reshape(call.shape)


def flatten(call: "Call", x: Tensor, *_: Any) -> Tensor:
    return x.reshape(call.shape)


def sliced(call: "Call", x: Tensor, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Tensor:
    part: Tensor = call.run(x, axis, start, stop, step)
    if axis % x.dim() in varying(x) and part.shape != x.shape:
        raise CannotFollow(f"takes channels {start}:{stop}:{step}, constants of the forward")
    return part


def indexed(call: "Call", x: Tensor, axis: int = 0, *rest: Any) -> Any:
    if axis % x.dim() in varying(x):
        raise CannotFollow("takes channels by constant indices")
    return call.run(x, axis, *rest)


def pixel_shuffle(call: "Call", x: Tensor, factor: int) -> Tensor:
    """The factor**2 channels that share an output channel are laid side by side in space: they are tied."""
    blocks = call.vector(x, x.dim() - 3).view(-1, factor**2)
    call.names.tie(blocks, blocks[:, :1])
    return call.spread(blocks[:, 0], x.dim() - 3)


def channel_shuffle(call: "Call", x: Tensor, groups: int) -> Tensor:
    """Interleaves equal blocks. Blocks stay equal under a cut when all keep the same positions, so these are tied."""
    blocks = call.vector(x, 1).view(groups, -1)
    call.names.tie(blocks, blocks[:1])
    result: Tensor = call.run(x, groups)
    return result


def roll(call: "Call", x: Tensor, shifts: list[int], axes: list[int] | None = None) -> Tensor:
    if not axes or {a % x.dim() for a in axes} & set(varying(x)):
        raise CannotFollow(f"shifts channels by {shifts}, a constant of the forward")
    return x.roll(shifts, axes)


def chunk(call: "Call", x: Tensor, chunks: int, axis: int = 0) -> list[Tensor]:
    """Equal parts stay equal under a cut when all of them keep the same positions, so these are tied."""
    parts: list[Tensor] = list(call.run(x, chunks, axis))
    if axis % x.dim() in varying(x):
        if len({part.shape for part in parts}) > 1:
            raise CannotFollow("of channels into unequal parts")
        for part in parts[1:]:
            call.names.tie(part, parts[0])
    return parts


def glu(call: "Call", x: Tensor, axis: int = -1) -> Tensor:
    """Half of the channels gates the other half: both keep the same positions."""
    first, second = x.chunk(2, axis)
    call.names.tie(first, second)
    return first


def split(call: "Call", x: Tensor, sizes: Any, axis: int = 0) -> Any:
    if axis % x.dim() in varying(x):
        raise CannotFollow(f"of channels into {sizes}, constants of the forward")
    return call.run(x, sizes, axis)


def cat(call: "Call", tensors: list[Tensor], axis: int = 0) -> Tensor:
    parts = [t for t in tensors if t.dim() == len(call.shape)]  # torch skips empty ones of shape (0,)
    result = _join(call, parts, axis % len(call.shape))
    if axis % len(call.shape) in varying(result) and any((dense(part) == NEUTRAL).all() for part in parts):
        call.suspect(result, "joins channels with a constant made in the forward")
    return result


def stack(call: "Call", tensors: list[Tensor], axis: int = 0) -> Tensor:
    axis = axis % len(call.shape)
    return _join(call, [t.unsqueeze(axis) for t in tensors], axis)


def _join(call: "Call", parts: list[Tensor], axis: int) -> Tensor:
    """Side by side along the channels, or along another axis (tokens, branches): then channels of equal index meet."""
    along = [varying(part) for part in parts]
    if any(along) and not any(axis in axes for axes in along):
        first = [part.narrow(axis, 0, 1) for part in parts if part.shape[axis]]
        return together(lambda *p: _meet(call, p), first).expand(call.shape)
    return together(lambda *p: torch.cat(p, axis), parts, fixed=axis)


def pad(call: "Call", x: Tensor, amounts: list[int], *_: Any, **__: Any) -> Tensor:
    """Constant padding. Over channels its amounts are constants of the forward that no cut can change."""
    padded = [x.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
    clash = set(padded) & set(varying(x))
    if clash:
        raise CannotFollow(f"pads {tuple(amounts)}: adds a constant number of channels to axis {min(clash)}")
    for axis in padded:
        x = x.narrow(axis, 0, 1)
    return x.expand(call.shape)


def spatial(call: "Call", x: Tensor, *_: Any, **__: Any) -> Any:
    """Pools and resizes trailing axes; each channel stays by itself. Channels run along axis 1, or 0 unbatched."""
    axes = [a for a in range(x.dim()) if x.shape[a] != call.shape[a]] if len(call.shape) == x.dim() else []
    rank = int(call.name.split("pool")[-1][:1]) if "pool" in call.name else len(axes)
    mixed = set(range(x.dim() - rank, x.dim())) | set(axes)
    if mixed & set(varying(x)):
        raise CannotFollow("mixes channels that differ along a pooled axis")
    for axis in mixed:
        x = x.narrow(axis, 0, 1)
    return x.expand(call.shape)


def spatial_with_indices(call: "Call", x: Tensor, *_: Any, **__: Any) -> list[Tensor]:
    return [spatial(call, x)] * 2


def mixing(call: "Call", x: Tensor, axes: Any = None, *rest: Any, **kwargs: Any) -> Tensor:
    """Combines elements along `axes` and keeps the shape (softmax, cumsum): harmless unless channels lie there."""
    axes = [axes] if isinstance(axes, int) else list(axes)
    if {a % x.dim() for a in axes} & set(varying(x)):
        raise CannotFollow("computes across the channels")
    return x


def reduction(call: "Call", x: Tensor, axes: Any = None, keepdim: bool = False, *_: Any, **__: Any) -> Any:
    """Reduces `axes` (all, if None). Names that differ there (a stack of branches) are tied, unless all channels do."""
    axes = range(x.dim()) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    axes = sorted(a % x.dim() for a in axes)
    if varying(x) and set(varying(x)) <= set(axes):
        raise CannotFollow("reduces over the channels")
    for axis in reversed(axes):
        first = x.narrow(axis, 0, 1)
        if axis in varying(x):
            call.names.tie(first, x)
        x = first if keepdim else first.squeeze(axis)
    return x


def extreme(call: "Call", x: Tensor, *rest: Any, **kwargs: Any) -> Any:
    """max and min: of everything, of two tensors, or along an axis with the indices."""
    if rest and isinstance(rest[0], Tensor):
        return elementwise(call, x, *rest)
    result = reduction(call, x, *rest, **kwargs)
    return [result] * 2 if rest or kwargs else result


def vector_norm(call: "Call", x: Tensor, order: Any = 2, axes: Any = None, keepdim: bool = False, **_: Any) -> Any:
    return reduction(call, x, axes, keepdim)


def layer_norm(call: "Call", x: Tensor, shape: list[int], *_: Any) -> Tensor:
    if set(range(x.dim() - len(shape), x.dim())) & set(varying(x)):
        raise CannotFollow("takes its statistics over the channels")
    return x


def like(call: "Call", x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def constant(call: "Call", *_: Any, **__: Any) -> Tensor:
    return call.neutral()


def nothing(call: "Call", *_: Any, **__: Any) -> None:
    """Only checks."""


def item(call: "Call", values: Any, index: int) -> Any:
    return values[index]


# -- helpers ----------------------------------------------------------------------------------------------------------


def _argument(rest: tuple[Any, ...], call: "Call", index: int, name: str, default: int) -> int:
    """An optional argument of a convolution: positional at `index` after the bias, or by keyword."""
    value = rest[index] if len(rest) > index else call.keyword(name, default)
    return int(value)


def _grouped_by_module(call: "Call", weight: Any, names: Tensor) -> None:
    """A convolution module's group count is set by the cut; one given to a function may be a constant."""
    if not isinstance(call.owner(weight), _ConvNd):
        call.suspect(names, "gets its group count from the forward")


def _rows(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_rows(convolution, "conv1d conv2d conv3d"),
    **_rows(transposed_convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_rows(linear, "linear"),
    **_rows(embedding, "embedding"),
    **_rows(per_channel_norm, "batch_norm instance_norm"),
    **_rows(prelu, "prelu"),
    **_rows(arithmetic, "add sub mul div true_divide pow rsub"),
    **_rows(
        elementwise,
        "abs addcdiv addcmul alias bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max clamp_min clone "
        "contiguous copy cos detach dropout elu eq erf exp feature_alpha_dropout feature_dropout alpha_dropout floor "
        "ge gelu gt hardsigmoid hardswish hardtanh le leaky_relu lerp lift_fresh_copy log log1p log_sigmoid "
        "logical_and logical_not logical_or lt masked_fill maximum minimum mish ne neg reciprocal relu relu6 round "
        "rsqrt selu sigmoid sign silu sin softplus softsign sqrt square tanh to _to_copy type_as where fill zero "
        "zeros_like ones_like full_like",
    ),
    **_rows(
        movement,
        "expand_as flip movedim permute pixel_unshuffle repeat repeat_interleave squeeze swapaxes "
        "t tile transpose unsqueeze",
    ),
    **_rows(reshape, "view reshape _unsafe_view"),
    **_rows(expand, "expand"),
    **_rows(unflatten, "unflatten"),
    **_rows(flatten, "flatten"),
    **_rows(sliced, "slice"),
    **_rows(indexed, "select narrow unbind"),
    **_rows(pixel_shuffle, "pixel_shuffle"),
    **_rows(channel_shuffle, "channel_shuffle"),
    **_rows(roll, "roll"),
    **_rows(chunk, "chunk"),
    **_rows(glu, "glu"),
    **_rows(split, "split split_with_sizes tensor_split"),
    **_rows(cat, "cat concat concatenate"),
    **_rows(stack, "stack"),
    **_rows(pad, "constant_pad_nd pad"),
    **_rows(
        spatial,
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d "
        "avg_pool3d max_pool1d max_pool2d max_pool3d upsample_nearest1d upsample_nearest2d upsample_bilinear2d "
        "upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa",
    ),
    **_rows(
        spatial_with_indices,
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices",
    ),
    **_rows(mixing, "softmax log_softmax _softmax cumsum cumprod"),
    **_rows(reduction, "mean sum amax amin var std logsumexp any all prod"),
    **_rows(extreme, "max min"),
    **_rows(vector_norm, "linalg_vector_norm"),
    **_rows(layer_norm, "layer_norm"),
    **_rows(constant, "zeros ones full arange empty new_zeros new_ones new_full scalar_tensor eye linspace rand randn"),
    **_rows(nothing, "_assert_tensor_metadata _assert_scalar _assert_async"),
    **_rows(item, "getitem"),
}

LAYERS: dict[Rule, int] = {
    convolution: 0,
    transposed_convolution: 0,
    linear: 0,
    embedding: 1,
    per_channel_norm: 0,
    prelu: 0,
    layer_norm: 0,
}
"""Rules that take parameters as such, with the argument that holds data. To all others parameters are data."""
