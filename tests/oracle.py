"""The oracle of surgery, which shares no code with it: closed channels are zeroed in the *inputs* of their readers."""

from typing import Any

import torch
import torch.nn.functional as F
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
    tensors = dict(model.named_parameters())
    closed = [
        (tensors[slot.tensor], slot.positions[~keep[group.name]].reshape(-1))
        for group in graph.groups if group.name in keep for slot in group.readers
    ]
    with torch.no_grad(), _Gates(closed):
        return run(model, x)


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
