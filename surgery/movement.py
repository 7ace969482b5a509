"""Data movement: run on the names as it is.

Where the code spells out a number that may not follow a cut, it leaves a doubt.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.names import NEUTRAL, dense, together, varying
from surgery.rules import CannotFollow, Rule, join, rows

if TYPE_CHECKING:
    from surgery.call import Call


def movement(call: "Call", *args: Any, **kwargs: Any) -> Any:
    """Moves data without computing: run on the names as it is."""
    return call.run(*args, **kwargs)


def reshape(call: "Call", x: Tensor, shape: Any) -> Tensor:
    """A view. Whether the sizes that it spells out follow the channels must be proven on a cut network."""
    if isinstance(shape, torch.dtype):
        raise CannotFollow(f"reads the bits as {shape}")
    if isinstance(shape, Tensor):
        return flatten(call, x)
    return _reshaped(call, x, tuple(shape), f"to {tuple(shape)} spells out the number of channels")


def unflatten(call: "Call", x: Tensor, axis: int, sizes: Any) -> Tensor:
    spelled = [-1] * (axis % x.dim()) + list(sizes)
    spelled += [-1] * (len(call.shape) - len(spelled))
    return _reshaped(call, x, tuple(spelled), f"to {tuple(sizes)} splits the channels")


def flatten(call: "Call", x: Tensor, *_: Any) -> Tensor:
    return _reshaped(call, x, (-1,) * len(call.shape), "")


def _reshaped(call: "Call", x: Tensor, sizes: tuple[int, ...], doubt: str) -> Tensor:
    shape, batch = list(call.shape), 1
    if x.dim() and shape and x.shape[0] == shape[0] and x.stride(0) == 0:  # the batch need not be written out
        x, batch = x.narrow(0, 0, 1), shape[0]
        shape[0] = 1
    result = x.reshape(shape)
    if batch != 1:
        result = result.expand(call.shape)
    axes = varying(result)
    if doubt and (any(sizes[axis] != -1 for axis in axes) or len(axes) > len(varying(x))):
        call.doubt(result, doubt, sizes)
    return result


def expand(call: "Call", x: Tensor, shape: list[int], **_: Any) -> Tensor:
    result = x.expand(call.shape)
    if any(shape[axis] != -1 for axis in varying(result)):
        call.doubt(result, f"to {tuple(shape)} spells out the number of channels", tuple(shape))
    return result


def sliced(call: "Call", x: Tensor, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Tensor:
    part: Tensor = call.run(x, axis, start, stop, step)
    axis %= x.dim()
    if axis in varying(x) and part.shape != x.shape:
        text = f"takes channels {start or 0}:{'' if (stop or 0) > x.shape[axis] else stop}:{step}"
        call.doubt(x, text)
        sizes = [-1] * x.dim()
        sizes[axis] = part.shape[axis]
        call.doubt(part, text, tuple(sizes) if not start else None)
    return part


def picked(call: "Call", x: Tensor, axis: int = 0, *rest: Any) -> Any:
    """select, narrow, index_select: at constant places of an axis."""
    if axis % x.dim() in varying(x):
        call.doubt(x, "takes channels by constant indices")
    return call.run(x, axis, *rest)


def index_select(call: "Call", x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Channels in another order. If a buffer holds the order, a cut renumbers it."""
    axis %= x.dim()
    if axis not in varying(x):
        return x.narrow(axis, 0, 1).expand(call.shape)
    if (dense(index) != NEUTRAL).any():
        raise CannotFollow("takes channels by computed indices")
    order: Tensor = call.raw(2)
    result = x.index_select(axis, order.to(x.device))
    call.order(order, call.vector(x, axis), call.vector(result, axis))
    call.doubt(x, "takes channels by constant indices")
    return result


def indexed(call: "Call", x: Tensor, indices: list[Any]) -> Tensor:
    """x[i, j, ...] with tensors."""
    raw = call.raw(1)
    if any(i is not None and i.dtype == torch.bool for i in raw) and any(
        i is not None and (dense(n) != NEUTRAL).any() for i, n in zip(raw, indices, strict=True)
    ):
        call.became_python()
    if any(n is not None and (dense(n) != NEUTRAL).any() for n in indices):
        raise CannotFollow("takes elements by computed indices")
    places = [None if i is None else i.to(x.device) for i in raw]
    hit = {axis for axis, i in enumerate(places) if i is not None} & set(varying(x))
    if hit and not x.is_contiguous() and x.numel() > 1 << 22:
        raise CannotFollow("takes channels by constant indices")
    if hit:
        call.doubt(x, "takes channels by constant indices")
    result: Tensor = call.run(x, places)
    given = [axis for axis, i in enumerate(raw) if i is not None]
    if list(varying(x)) == given and raw[given[0]].dim() == 1 and raw[given[0]].dtype == torch.long:
        call.order(raw[given[0]], call.vector(x, given[0]), call.vector(result, given[0]))
    return result


def chunk(call: "Call", x: Tensor, chunks: int, axis: int = 0) -> list[Tensor]:
    """Equal parts stay equal under a cut when all of them keep the same positions, so these are tied."""
    parts: list[Tensor] = list(call.run(x, chunks, axis))
    if axis % x.dim() in varying(x):
        if len({part.shape for part in parts}) > 1:
            raise CannotFollow("of channels into unequal parts")
        for part in parts[1:]:
            call.names.tie(part, parts[0])
    return parts


def split(call: "Call", x: Tensor, sizes: Any, axis: int = 0) -> Any:
    """Into parts of spelled sizes. Parts of one size are tied as in `chunk`; a list may hold equal ones by chance."""
    parts = list(call.run(x, sizes, axis))
    if axis % x.dim() in varying(x) and len(parts) > 1:
        if isinstance(sizes, int) and len({part.shape for part in parts}) == 1:
            for part in parts[1:]:
                call.names.tie(part, parts[0])
        for names in (x, *parts):  # the whole width as well: `split(self.width // 2)` spells it out
            spelled = [names.shape[a] if a == axis % x.dim() else -1 for a in range(x.dim())]
            call.doubt(names, f"of channels into {sizes}", tuple(spelled))
        if not isinstance(sizes, int):
            call.remembered_list(list(sizes), [call.vector(part, axis % x.dim()) for part in parts])
    return parts


def glu(call: "Call", x: Tensor, axis: int = -1) -> Tensor:
    """Half of the channels gates the other half: both keep the same positions."""
    first, second = x.chunk(2, axis)
    call.names.tie(first, second)
    return first


def cat(call: "Call", tensors: list[Tensor], axis: int = 0) -> Tensor:
    parts = [t for t in tensors if t.dim() == len(call.shape)]  # torch skips empty ones of shape (0,)
    result = _side_by_side(call, parts, axis % len(call.shape))
    if (dense(result) == NEUTRAL).any() and axis % len(call.shape) in varying(result):
        call.doubt(result, "joins channels with a constant made in the forward")
    return result


def stack(call: "Call", tensors: list[Tensor], axis: int = 0) -> Tensor:
    axis = axis % len(call.shape)
    return _side_by_side(call, [t.unsqueeze(axis) for t in tensors], axis)


def _side_by_side(call: "Call", parts: list[Tensor], axis: int) -> Tensor:
    """Side by side along the channels, or along another axis (tokens, branches): then channels of equal index meet."""
    if any(varying(part) and axis not in varying(part) for part in parts):
        parts = [_tokens(call, part, axis) for part in parts]
    if not any(axis in varying(part) for part in parts) and any(varying(part) for part in parts):
        first = [part.narrow(axis, 0, 1) for part in parts if part.shape[axis]]
        return join(call, first).expand(call.shape)
    return together(lambda *p: torch.cat(p, axis), parts, fixed=axis)


def _tokens(call: "Call", part: Tensor, axis: int) -> Tensor:
    """Several tokens that are one parameter have the same channels as the tokens beside which they are laid."""
    if len(varying(part)) < 2 or axis not in varying(part) or not call.of_parameter(part):
        return part
    first = part.narrow(axis, 0, 1)
    call.names.tie(part, first)
    return first.expand(part.shape)


def pad(call: "Call", x: Tensor, amounts: list[int], mode: str = "constant", *_: Any, **__: Any) -> Tensor:
    """Padding. Over channels it adds a constant number of them, which stay; the padded ones follow a cut."""
    for i in range(0, len(amounts), 2):
        axis, before, after = x.dim() - 1 - i // 2, amounts[i], amounts[i + 1]
        if axis not in varying(x):
            length = x.shape[axis] + before + after
            x = x.narrow(axis, 0, 1).expand([length if a == axis else n for a, n in enumerate(x.shape)])
        elif mode != "constant" or min(before, after) < 0:
            raise CannotFollow(f"pads {tuple(amounts)} in mode {mode}")
        elif before or after:
            x = _padded(call, x, axis, (before, after), f"pads {tuple(amounts)}: adds constant channels")
    return x


def _padded(call: "Call", x: Tensor, axis: int, amounts: tuple[int, int], reason: str) -> Tensor:
    def constants(amount: int) -> Tensor:
        names = call.names.fresh(amount)
        call.names.pin(names, f"{call.name} at {call.where} {reason}")
        shape = [amount if a == axis else n for a, n in enumerate(x.shape)]
        return names.view([-1 if a == axis else 1 for a in range(x.dim())]).expand(shape)

    before, after = map(constants, amounts)
    parts = [part for part in (before, x, after) if part.shape[axis]]
    return together(lambda *p: torch.cat(p, axis), parts, fixed=axis)


def roll(call: "Call", x: Tensor, shifts: list[int], axes: list[int] | None = None) -> Tensor:
    if not axes or {a % x.dim() for a in axes} & set(varying(x)):
        raise CannotFollow(f"shifts channels by {shifts}, a constant of the forward")
    return x.roll(shifts, axes)


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


def patches(call: "Call", x: Tensor, kernel: Any, *_: Any) -> Tensor:
    """unfold: each channel becomes kernel-many neighbours, (n, c, h, w) -> (n, c * kernel, places)."""
    channels = call.vector(x, x.dim() - 3)
    return call.spread(channels.repeat_interleave(call.shape[-2] // len(channels)), len(call.shape) - 2)


def unpatches(call: "Call", x: Tensor, size: Any, kernel: Any, *_: Any) -> Tensor:
    """fold: kernel-many neighbours become one channel."""
    blocks = call.vector(x, x.dim() - 2).view(call.shape[-3], -1)
    call.names.tie(blocks, blocks[:, :1])
    return call.spread(blocks[:, 0], len(call.shape) - 3)


def windows(call: "Call", x: Tensor, axis: int, size: int, step: int) -> Tensor:
    """Tensor.unfold: windows along an axis become a last axis."""
    if axis % x.dim() in varying(x):
        raise CannotFollow("slides over the channels")
    return x.narrow(axis, 0, 1).unsqueeze(-1).expand(call.shape)


MOVEMENT_RULES: dict[str, Rule] = {
    **rows(
        movement,
        "expand_as flip movedim permute pixel_unshuffle repeat repeat_interleave squeeze swapaxes swapdims "
        "t tile transpose unsqueeze numpy_T mT adjoint broadcast_to",
    ),
    **rows(reshape, "view reshape _unsafe_view view_as reshape_as"),
    **rows(expand, "expand"),
    **rows(unflatten, "unflatten"),
    **rows(flatten, "flatten ravel"),
    **rows(sliced, "slice"),
    **rows(picked, "select narrow unbind"),
    **rows(index_select, "index_select"),
    **rows(indexed, "index"),
    **rows(pixel_shuffle, "pixel_shuffle"),
    **rows(channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **rows(roll, "roll"),
    **rows(chunk, "chunk"),
    **rows(glu, "glu"),
    **rows(split, "split split_with_sizes tensor_split"),
    **rows(cat, "cat concat concatenate"),
    **rows(stack, "stack"),
    **rows(pad, "constant_pad_nd pad"),
    **rows(patches, "im2col"),
    **rows(unpatches, "col2im"),
    **rows(windows, "unfold"),
}
