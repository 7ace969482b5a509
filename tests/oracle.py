"""The oracle of surgery, which shares no code with it: closed channels are zeroed in the *inputs* of their readers.

Readers that are no convolution or linear layer called as such (attention, LSTM, a bare parameter) get zeros in their
weights. Norms over the width are computed on the open channels alone, picked out.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery import ChannelGraph


def random_keep(graph: ChannelGraph, seed: int, share: float = 0.5) -> dict[str, Tensor]:
    """Each unit kept with chance `share`; in every group at least one is kept and, if it has two, one closed."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in graph.groups:
        flags = torch.rand(group.units, generator=generator) < share
        flags[int(torch.randint(group.units, (1,), generator=generator))] = True
        if flags.all() and group.units > 1:
            flags[int(torch.randint(group.units, (1,), generator=generator))] = False
        if not flags.any():
            flags[0] = True
        keep[group.name] = flags
    return keep


class _Gates(TorchFunctionMode):
    """Zeroes the closed channels of whatever a convolution or linear layer is about to read."""

    def __init__(self, closed: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.closed = closed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READERS:
            weight = args[1]
            for parameter, channels in self.closed:
                if weight is parameter:
                    args = (self._zeroed(func, args, kwargs, channels), *args[1:])
        return func(*args, **kwargs)

    def _zeroed(self, func: Any, args: Any, kwargs: Any, channels: Tensor) -> Tensor:
        x, weight = args[0].clone(), args[1]
        if func is F.linear:
            x[..., channels] = 0
            return x
        axis = x.dim() - weight.dim() + 1
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        period = x.shape[axis] // groups
        for start in range(0, x.shape[axis], period):
            x.index_fill_(axis, start + channels, 0)
        return x


READERS = (
    F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
    torch.conv_transpose3d,
)


def gated_output(model: nn.Module, graph: ChannelGraph, keep: dict[str, Tensor], x: Any) -> Any:
    """The output of `model` when each layer that reads a closed channel finds zeros there."""
    tensors, closed, zeroed = dict(model.named_parameters()), [], []
    called = {
        id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)
        and not isinstance(model.get_submodule(n.rpartition(".")[0]), nn.MultiheadAttention)
    }
    hooks, norms = [], dict[str, Tensor]()
    for group in graph.groups:
        if group.name not in keep:
            continue
        for slot in group.slots:
            positions = slot.positions[~keep[group.name]].reshape(-1)
            if slot.role == "read":
                (closed if id(tensors[slot.tensor]) in called else zeroed).append((slot, positions))
            elif slot.role == "norm":
                flags = norms.setdefault(slot.tensor, torch.ones(graph.sizes[slot.tensor], dtype=torch.bool))
                flags[positions] = False
    for name, flags in norms.items():
        hooks.append(model.get_submodule(name.rpartition(".")[0]).register_forward_hook(_norm_of_the_open(flags)))
    before = {slot.tensor: tensors[slot.tensor].detach().clone() for slot, _ in zeroed}
    try:
        with torch.no_grad():
            for slot, positions in zeroed:
                tensors[slot.tensor].index_fill_(slot.axis, positions, 0)
            with _Gates([(tensors[slot.tensor], positions) for slot, positions in closed]):
                return run(model, x)
    finally:
        with torch.no_grad():
            for name, value in before.items():
                tensors[name].copy_(value)
        for hook in hooks:
            hook.remove()


def _norm_of_the_open(flags: Tensor) -> Any:
    """A forward hook that computes the norm anew on the channels in `flags`."""

    def hook(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        channels_first = isinstance(norm, nn.GroupNorm | torchvision.models.convnext.LayerNorm2d)
        axis = 1 if channels_first else args[0].dim() - 1
        x = args[0].movedim(axis, -1)[..., flags]
        small = copy.deepcopy(norm)
        small._forward_hooks.clear()
        for name in ("weight", "bias"):
            if getattr(norm, name, None) is not None:
                setattr(small, name, nn.Parameter(getattr(norm, name)[flags]))
        if isinstance(norm, nn.GroupNorm):
            small.num_channels = int(flags.sum())
        else:
            small.normalized_shape = (int(flags.sum()),)
        result = output.clone().movedim(axis, -1)
        result[..., flags] = small(x.movedim(-1, axis)).movedim(axis, -1)
        return result.movedim(-1, axis)

    return hook


def run(model: nn.Module, x: Any) -> Any:
    """The forward on a tensor, on positional inputs or on keyword inputs."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def relative_error(reference: object, output: object) -> float:
    """max |difference| / max |reference|, worst over all outputs, of equal shapes; no reference may be constant."""
    pairs = zip(_leaves(reference), _leaves(output), strict=True)
    worst = 0.0
    for a, b in pairs:
        assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
        assert a.std() > 1e-6 * a.abs().max() > 0, "the reference is constant: this check could not fail"
        worst = max(worst, ((a - b).abs().max() / a.abs().max()).item())
    return worst


def _leaves(output: object) -> list[Tensor]:
    if output is None:
        return []
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [leaf for value in values for leaf in _leaves(value)]  # type: ignore[attr-defined]
