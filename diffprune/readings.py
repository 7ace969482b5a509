"""What layers read and give at sampled places: the rows of the least-squares problems that a layer solves."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import ChannelGraph
from surgery.graph import OVER

PLACES = 32
"""Places of an image at which a convolution is looked at (all, if there are fewer); neighbours say nearly the same."""


def linear_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that own the weights `names` and are plain: linear, or a 2-D convolution of one group."""
    found = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        layer = model.get_submodule(owner)
        plain = type(layer) is nn.Linear or (
            type(layer) is nn.Conv2d
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )
        if plain and last == "weight":
            found[name] = layer
    return found


def fixed_rows(graph: ChannelGraph) -> list[str]:
    """Weights of the layers that a cut leaves their rows: those that mix tokens have a row for each channel."""
    return [layer.weight for layer in graph.layers if layer.weight + OVER not in graph.sizes]


def read_by(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x


@contextmanager
def listening(
    layers: Mapping[str, nn.Module], hear: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """While inside, `hear(name, layer, inputs, outputs)` is told of every forward of the layers."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        return lambda layer, args, kwargs, output: hear(name, layer, read_by(args, kwargs), output)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(hook(name), with_kwargs=True))
        yield


def rows_read(name: str, layer: nn.Module, x: Tensor) -> Tensor:
    """What `layer` multiplies its weights with at sampled places, shape (rows, inputs per output).

    Column c * kernel + k is channel c at offset k of the kernel, as in `weight.flatten(1)`. The places depend on `name`
    and the sizes of `x` in batch and space alone: in a cut network they are the same.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])[_places(name, x.shape[:-1].numel(), PLACES * len(x), x.device)]
    kernel, stride, padding, dilation = _geometry(layer)
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    height, width = (
        (n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(padded.shape[2:], dilation, kernel, stride, strict=True)
    )
    spots = _spots(name, len(x), height * width, x.device)
    first = spots // width * stride[0] * padded.shape[3] + spots % width * stride[1]
    offsets = [a * dilation[0] * padded.shape[3] + b * dilation[1] for a in range(kernel[0]) for b in range(kernel[1])]
    flat = padded.flatten(2)
    columns = [flat.gather(2, (first + offset)[:, None].expand(-1, flat.shape[1], -1)) for offset in offsets]
    return torch.stack(columns, -1).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def rows_given(name: str, layer: nn.Module, y: Tensor) -> Tensor:
    """What `layer` gives at the places of `rows_read`, shape (rows, outputs)."""
    if not isinstance(layer, nn.Conv2d):
        return y.reshape(-1, y.shape[-1])[_places(name, y.shape[:-1].numel(), PLACES * len(y), y.device)]
    spots = _spots(name, len(y), y.shape[2] * y.shape[3], y.device)
    return y.flatten(2).gather(2, spots[:, None].expand(-1, y.shape[1], -1)).transpose(1, 2).flatten(0, 1)


def _geometry(layer: nn.Conv2d) -> tuple[tuple[int, ...], ...]:
    """Kernel, stride, padding and dilation, each in height and width."""
    assert not isinstance(layer.padding, str)
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation


def _spots(name: str, images: int, count: int, device: torch.device) -> Tensor:
    """Places in each image, shape (images, places)."""
    if count <= PLACES:
        return torch.arange(count, device=device).expand(images, -1)
    return torch.randint(count, (images, PLACES), generator=_generator(name)).to(device)


def _places(name: str, count: int, most: int, device: torch.device) -> Tensor:
    """At most so many of `count` rows."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.randperm(count, generator=_generator(name))[:most].to(device)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
