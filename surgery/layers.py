"""Operators with weights: which axis reads the names of the input, which writes new ones, which carries them."""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from surgery.names import NEUTRAL, dense, everywhere, varying
from surgery.rules import CannotFollow, Rule, rows, tie_along

if TYPE_CHECKING:
    from surgery.call import Call


def convolution(call: "Call", x: Tensor, weight: Any, bias: Any = None, *rest: Any) -> Tensor:
    """Reads axis 1 of `weight` (out, in / groups, *kernel), writes axis 0. Depthwise: carries axis 0."""
    weight, groups = call.parameter(weight), _groups(call, rest)
    axis = 1 if x.dim() == len(weight.shape) else 0
    names = call.vector(x, axis)
    out, per_group = weight.shape[0], weight.shape[1]
    if groups == 1:
        call.read(weight, 1, names)
        written = call.write(weight, 0)
    elif per_group == 1 and call.was(weight.name, 1) != "read":
        written = names.repeat_interleave(out // groups)
        _group_count(call, weight, written, axis)
        call.carry(weight, 0, written)
    else:
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
    weight, groups = call.parameter(weight), _groups(call, rest)
    axis = 1 if x.dim() == len(weight.shape) else 0
    names = call.vector(x, axis)
    if groups == 1:
        call.read(weight, 0, names)
        written = call.write(weight, 1)
    elif groups == weight.shape[0]:
        written = names.repeat_interleave(weight.shape[1])
        _group_count(call, weight, written, axis)
        call.carry(weight, 0, names)
    else:
        raise CannotFollow("is a grouped transposed convolution")
    call.carry(bias, 0, written)
    call.count(weight, outputs_per_channel=x.numel() / weight.shape[0])
    return call.spread(written, axis)


def linear(call: "Call", x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """Reads axis 1 of `weight` (out, in), writes axis 0. Along another axis than the channels: to each the same."""
    weight = call.parameter(weight)
    across = varying(x)
    if across and x.dim() - 1 not in across:
        return _mixing_positions(call, x, weight, bias, across)
    call.read(weight, 1, call.vector(x, x.dim() - 1))
    written = call.write(weight, 0)
    call.carry(bias, 0, written)
    call.count(weight, outputs_per_channel=call.shape.numel() / weight.shape[0])
    return call.spread(written, len(call.shape) - 1)


def _mixing_positions(call: "Call", x: Tensor, weight: Any, bias: Any, across: list[int]) -> Tensor:
    """A linear layer over tokens does for each channel the same: the channels pass, the tokens stay whole."""
    tokens = call.write(weight, 0)
    call.names.pin(tokens, f"linear at {call.where} is applied to each channel of another axis")
    call.carry(bias, 0, tokens)
    call.count(weight, call.shape.numel() / weight.shape[0], over=call.vector(x, across[0]))
    return x.narrow(x.dim() - 1, 0, 1).expand(call.shape)


def embedding(call: "Call", weight: Any, index: Tensor, *_: Any) -> Tensor:
    """Writes axis 1 of `weight` (entries, channels)."""
    return call.spread(call.write(call.parameter(weight), 1), len(call.shape) - 1)


def per_channel_norm(call: "Call", x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, *_: Any) -> Tensor:
    """Batch and instance norm: every statistic and scale belongs to one channel of axis 1."""
    names = call.vector(x, 1)
    if weight is None and mean is None:  # no tensor of the layer tells its width
        call.remembered("num_features", names)
    for vector in (weight, bias, mean, variance):
        call.carry(vector, 0, names)
    return x


def prelu(call: "Call", x: Tensor, weight: Any) -> Tensor:
    if call.parameter(weight).shape != (1,):
        call.carry(weight, 0, call.vector(x, 1 if x.dim() > 1 else 0))
    return x


def layer_norm(call: "Call", x: Tensor, shape: list[int], weight: Any = None, bias: Any = None, *_: Any) -> Tensor:
    """Layer and RMS norm: statistics over the last axes. Over the width they must leave closed channels out."""
    last = x.dim() - 1
    if varying(x) == [last] and len(shape) == 1:
        names = call.vector(x, last)
        call.size("normalized_shape", names, role="norm")
        for vector in (weight, bias):
            call.carry(vector, 0, names)
        return x
    tie_along(call, x, set(range(x.dim() - len(shape), x.dim())), "takes its statistics over")
    return x


def rms_norm(call: "Call", x: Tensor, shape: list[int], weight: Any = None, *_: Any) -> Tensor:
    return layer_norm(call, x, shape, weight)


def group_norm(call: "Call", x: Tensor, groups: int, weight: Any = None, bias: Any = None, *_: Any) -> Tensor:
    """Statistics over the channels of each norm group.

    With more groups than channels in one, whole groups are cut, which changes no statistic; else every group loses
    the same positions and its statistics must leave them out.
    """
    names = call.vector(x, 1)
    if len(names.unique()) > 1 or x.shape[1] == 1:
        blocks = names.view(groups, -1)
        whole_groups = {"size": True, "norm": False}.get(call.was(f"{call.owner}.num_channels"))
        if groups >= blocks.shape[1] if whole_groups is None else whole_groups:
            call.names.tie(blocks, blocks[:, :1])
            call.size("num_channels", names)
            call.size("num_groups", blocks[:, 0])
        else:
            call.names.tie(blocks, blocks[:1])
            call.size("num_channels", names, role="norm")
    for vector in (weight, bias):
        call.carry(vector, 0, names)
    return x


def recurrent(call: "Call", x: Tensor, hidden: Any, weights: list[Any], biased: bool, *rest: Any) -> list[Tensor]:
    """LSTM, GRU and RNN: the first layer reads the input; hidden states stay whole."""
    names = call.vector(x, x.dim() - 1)
    if (dense(names) == NEUTRAL).any():
        raise CannotFollow("reads constants")
    call.size("input_size", names)
    layers, bidirectional = int(rest[0]), bool(rest[3])
    reason = f"{call.name} at {call.where} feeds its hidden state back"
    per_direction = len(weights) // (layers * (2 if bidirectional else 1))
    for direction in range(2 if bidirectional else 1):
        call.read(call.parameter(weights[direction * per_direction]), 1, names)
    for weight in weights:
        if len(weight.shape) > 1:
            call.count(call.parameter(weight), outputs_per_channel=call.shape.numel() / call.shape[-1])
        for axis in range(len(weight.shape)):
            if not (axis == 1 and any(weight is weights[d * per_direction] for d in range(1 + bidirectional))):
                call.names.pin(call.write(weight, axis), reason)
    results = call.result if isinstance(call.result, tuple | list) else [call.result]
    hidden_name = call.names.fresh(1)
    call.names.pin(hidden_name, reason)
    return [everywhere(hidden_name, t.shape) for t in results]


def _groups(call: "Call", rest: tuple[Any, ...]) -> int:
    """The group count: positional at the fourth place after the bias, or by keyword. Transposed: the same place."""
    return int(rest[3] if len(rest) > 3 else call.keyword("groups", 1))


def _group_count(call: "Call", weight: Any, names: Tensor, axis: int) -> None:
    """A convolution module's group count is set by the cut; a function may get a constant, or what is remembered."""
    if not isinstance(call.layer(weight), _ConvNd):
        spelled = tuple(len(names) if a == axis else -1 for a in range(len(call.shape)))
        call.doubt(call.spread(names, axis), "gets its group count from the forward", spelled)


LAYER_RULES: dict[str, Rule] = {
    **rows(convolution, "conv1d conv2d conv3d"),
    **rows(transposed_convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **rows(linear, "linear"),
    **rows(embedding, "embedding"),
    **rows(per_channel_norm, "batch_norm instance_norm"),
    **rows(prelu, "prelu"),
    **rows(layer_norm, "layer_norm"),
    **rows(rms_norm, "rms_norm"),
    **rows(group_norm, "group_norm"),
    **rows(recurrent, "lstm gru rnn_tanh rnn_relu"),
}

MULTIPLYING = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 1),
    "linear": 1, "deform_conv2d": 1, "bilinear": 2,
}  # fmt: skip
"""Operators whose multiply-adds count also where they are not followed, with the argument that is the weight."""

LAYERS: dict[Rule, int] = dict.fromkeys(LAYER_RULES.values(), 0) | {embedding: 1}
"""These rules take parameters as such, except in the argument that holds data."""
