"""Pixels in: the scaling to 0..1 and the normalisation as part of the file."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.errors import NotExportable

LEVELS = 255
"""The largest value of a uint8 pixel, which becomes 1."""


@dataclass(frozen=True)
class Preprocessing:
    """(x / 255 - mean) / std for pixels x, (N, H, W, C) uint8; `mean` and `std` have one number per channel, in 0..1.

    Decoding, resizing and cropping stay with the caller: they are where runtimes differ.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # numpy's and torch's numbers are none that JSON knows
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))

    def normalisation(self) -> dict[str, str]:
        """What a file says that takes pixels after this."""
        return {"mean": json.dumps(list(self.mean)), "std": json.dumps(list(self.std))}

    def metadata(self) -> dict[str, str]:
        """What a file with this inside says of its input."""
        inside = "inside this file: uint8 NHWC in, then (x / 255 - mean) / std"
        return {**self.normalisation(), "preprocessing": inside}

    def fits(self, channels: int | None) -> bool:
        """Whether it can normalise images of so many channels."""
        finite = all(map(math.isfinite, (*self.mean, *self.std))) and all(value > 0 for value in self.std)
        return finite and {len(self.mean), len(self.std)} == {channels}

    def before(self, network: nn.Module, examples: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """`network` with this in front, and random pixels for it in place of its own example, (N, C, H, W).

        Raises:
            NotExportable: the network takes something else than images of this many channels, or std is not above 0.
        """
        shapes = [f"{tuple(example.shape)} {example.dtype}" for example in examples]
        one = len(examples) == 1 and examples[0].dim() == 4 and examples[0].is_floating_point()
        channels = examples[0].shape[1] if one else None
        if not self.fits(channels):
            raise NotExportable(
                f"mean {tuple(self.mean)} and std {tuple(self.std)} do not normalise {' and '.join(shapes)}",
                at="preprocessing", effect="nothing was written",
                fix="give one mean and one std above 0 per channel of a network that takes float images (N, C, H, W)",
            )
        batch, _, height, width = examples[0].shape
        draw = torch.Generator().manual_seed(0)
        pixels = torch.randint(LEVELS + 1, (batch, height, width, channels or 0), generator=draw, dtype=torch.uint8)
        return _FromPixels(network, self.mean, self.std, examples[0].dtype).eval(), (pixels,)


class _FromPixels(nn.Module):
    """The order of the operations is that of the training data's preparation, so that the numbers are the same."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=dtype).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> object:
        # Contiguous: with the strides of NHWC the exporter would write pooling as gathers over computed indices.
        images = pixels.permute(0, 3, 1, 2).contiguous().to(self.mean.dtype) / LEVELS
        return self.network((images - self.mean) / self.std)
