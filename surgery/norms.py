"""Norms over the width: while channels are only closed, their statistics must leave them out.

    mean = sum_c open_c x_c / sum_c open_c          var = sum_c open_c (x_c - mean)^2 / sum_c open_c

With zeros and ones this is exactly the norm of the cut network, whose plain layer simply has fewer channels.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.graph import ChannelGraph

OPEN = "open"
"""The buffer of a gated norm that says which channels its statistics count, shape (channels,), values 0 and 1."""


def norm_units(graph: ChannelGraph) -> dict[str, Tensor]:
    """Per module that takes statistics over channels, the unit at each of them in the flat order of all units.

    Channels that no group holds point past the end.
    """
    return {size.rpartition(".")[0]: units for (size, _), units in graph.units_along("norm").items()}


def gate_norm_(norm: nn.Module, open_: Tensor) -> None:
    """From now on the statistics of `norm` count each channel by `open_`, shape (channels,); kept as a buffer.

    The class becomes a subclass of what it was; names of parameters stay.
    """
    own = next(norm.parameters(), open_)  # the parts of a network may lie on several devices
    plain = type(norm)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Gated(self.open):
            return plain.forward(self, *args, **kwargs)

    norm.__class__ = type(f"Gated{plain.__name__}", (plain,), {"forward": forward, "plain": plain})
    norm.register_buffer(OPEN, open_.to(own.device), persistent=False)
    norm.register_forward_hook(_no_fast_path)


def is_gated(norm: nn.Module) -> bool:
    return hasattr(type(norm), "plain") and OPEN in norm._buffers


def narrow_gate_(norm: nn.Module, kept: Tensor) -> None:
    """A gated norm lost all channels but `kept`; with none left to leave out, it is a plain norm again."""
    open_ = norm._buffers[OPEN]
    assert open_ is not None
    norm.register_buffer(OPEN, open_[kept.to(open_.device)], persistent=False)
    ungate_(norm)


def ungate_(norm: nn.Module) -> None:
    """Make a gated norm plain if all its channels count."""
    if bool(norm.get_buffer(OPEN).all()):
        plain: Any = type(norm)
        norm.__class__ = plain.plain
        del norm._buffers[OPEN]
        norm._non_persistent_buffers_set.discard(OPEN)
        for key, hook in list(norm._forward_hooks.items()):
            if hook is _no_fast_path:
                del norm._forward_hooks[key]


def _no_fast_path(*_: Any) -> None:
    """torch's fused encoder layer reads weights past the forward of their modules, unless a module has a hook."""


class _Gated(TorchFunctionMode):
    def __init__(self, open_: Tensor) -> None:
        super().__init__()
        self.open = open_

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        norm = GATED.get(func)
        return func(*args, **(kwargs or {})) if norm is None else norm(self.open, *args, **(kwargs or {}))


def _in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As torch's own norms are: statistics in half precision overflow. Under autocast on a GPU so is the result."""

    @functools.wraps(norm)
    def wide(open_: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input.dtype not in (torch.float16, torch.bfloat16):
            return norm(open_, input, *args, **kwargs)
        result = norm(open_, input.float(), *args, **kwargs)
        autocast = input.device.type == "cuda" and torch.is_autocast_enabled("cuda")  # on a CPU it knows no norms
        return result if autocast else result.to(input.dtype)

    return wide


@_in_float32
def _layer_norm(
    open_: Tensor, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    share = _share(open_, input)
    centred = input - (input * share).sum(-1, keepdim=True)
    scale = (share * centred.square()).sum(-1, keepdim=True).add(eps).rsqrt()
    return _affine(centred * scale, weight, bias)


@_in_float32
def _rms_norm(
    open_: Tensor, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps  # of what is computed in, also for half precision
    scale = (_share(open_, input) * input.square()).sum(-1, keepdim=True).add(eps).rsqrt()
    return _affine(input * scale, weight, None)


@_in_float32
def _group_norm(
    open_: Tensor, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    blocks = input.reshape(input.shape[0], num_groups, -1, *input.shape[2:]).flatten(3) if input.dim() > 2 else (
        input.reshape(input.shape[0], num_groups, -1, 1))
    counted = open_.to(input.dtype).view(1, num_groups, -1, 1).expand_as(blocks)
    total = counted.sum((2, 3), keepdim=True).clamp_min(1e-12)
    centred = blocks - (blocks * counted).sum((2, 3), keepdim=True) / total
    scale = ((counted * centred.square()).sum((2, 3), keepdim=True) / total).add(eps).rsqrt()
    view = [1, -1] + [1] * (input.dim() - 2)
    return _affine((centred * scale).reshape(input.shape), *(v if v is None else v.view(view) for v in (weight, bias)))


def _share(open_: Tensor, input: Tensor) -> Tensor:
    open_ = open_.to(input.dtype)
    return open_ / open_.sum().clamp_min(1e-12)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


GATED: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
}
