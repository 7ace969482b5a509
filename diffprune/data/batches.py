"""From images as they are stored to batches that can be iterated as often as needed.

Letters: N images, C channels, H rows, W columns, S the side of a square image.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffprune.errors import BadData

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the channels, as torchvision's weights expect them."""

MOST_CLASSES = 1_000_000  # a label beyond is not a class, and would fill the memory with names

Read = Callable[[Tensor], Tensor]  # indices (n,) to images (n, C, H, W), as stored: uint8 or float32
Augment = Callable[[Tensor, torch.Generator], Tensor]  # images to images of the same shape and dtype


@dataclass(frozen=True)
class Batches:
    """Batches of (images (N, C, H, W) float32, labels (N,) int64), to be iterated as often as needed.

    Images to train on may have None in the place of their labels: the dense network's answers are learned from then.

    examples: how many images one pass gives at most. batches: how many batches. start: begins one pass.
    """

    examples: int
    batches: int
    start: Callable[[], Iterator[tuple[Tensor, Any]]]

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        return self.start()

    def __len__(self) -> int:
        return self.batches


@dataclass(frozen=True)
class Data:
    """Training and validation batches with the name of each label, (C, H, W), and the mean and std taken out of them.

    The training side is shuffled anew in every pass: the same seed gives the same sequence of passes. The validation
    side keeps its order and every example.
    """

    train: Batches
    val: Batches
    labels: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Side:
    """Half of a data set as it is stored, `count` images; labels (count,) int64, if there are any."""

    read: Read
    count: int
    labels: Tensor | None

    def labels_of(self, part: Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[part]


@dataclass(frozen=True)
class Source:
    """A data set as it is stored, of images (C, H, W), and how it is normalised and augmented."""

    train: Side
    val: Side
    labels: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | None = None


def bad_data(fact: str, at: object, fix: str) -> BadData:
    return BadData(fact, at=str(at), effect="nothing was started", fix=fix)


def batched(source: Source, *, size: int | None, batch: int, seed: int, augment: bool) -> Data:
    shape = source.shape if size is None else (source.shape[0], size, size)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (source.mean, source.std))

    def prepare(images: Tensor) -> Tensor:
        images = images.float().div_(255) if images.dtype == torch.uint8 else images
        if images.shape[2:] != shape[1:]:
            images = F.interpolate(images, shape[1:], mode="bilinear", antialias=True)
        return (images - mean) / std

    change = source.augment if augment else None
    return Data(
        train=_shuffled(source.train, prepare, change, batch=batch, seed=seed),
        val=_in_order(source.val, prepare, batch=batch),
        labels=source.labels,
        input_shape=shape,
        mean=source.mean,
        std=source.std,
    )


def _parts(indices: Tensor, batch: int) -> list[Tensor]:
    return [indices[start : start + batch] for start in range(0, len(indices), batch)]


def _in_order(side: Side, prepare: Callable[[Tensor], Tensor], *, batch: int) -> Batches:
    parts = _parts(torch.arange(side.count), batch)

    def start() -> Iterator[tuple[Tensor, Any]]:
        return ((prepare(side.read(part)), side.labels_of(part)) for part in parts)

    return Batches(examples=side.count, batches=len(parts), start=start)


def _shuffled(
    side: Side, prepare: Callable[[Tensor], Tensor], augment: Augment | None, *, batch: int, seed: int
) -> Batches:
    passes = torch.Generator().manual_seed(seed)
    # The rest that does not fill a batch is left out: batch norm would take its statistics over a handful of images.
    # The next pass has another order, so nothing is left out for good.
    batches = max(1, side.count // batch)

    def start() -> Iterator[tuple[Tensor, Any]]:
        # A generator of its own for each pass: one that is given up half-way does not change the next.
        draw = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=passes)))
        for part in _parts(torch.randperm(side.count, generator=draw), batch)[:batches]:
            images = side.read(part)
            yield prepare(images if augment is None else augment(images, draw)), side.labels_of(part)

    return Batches(examples=side.count, batches=batches, start=start)


def flipped(images: Tensor, draw: torch.Generator) -> Tensor:
    """Half of the images, mirrored left to right."""
    flip = torch.rand(len(images), 1, 1, 1, generator=draw) < 0.5
    return torch.where(flip, images.flip(3), images)


def cropped_and_flipped(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels each way over a black border, half of them mirrored."""
    count, _, height, width = images.shape
    top, left = torch.randint(9, (2, count), generator=draw)
    windows = F.pad(images, (4, 4, 4, 4)).unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 9, 9, H, W), a view
    return flipped(windows[torch.arange(count), :, top, left], draw)


def held_out(count: int, share: float) -> Tensor:
    """Which of `count` examples (count,) bool are held out: the same ones in every run, whatever its seed."""
    held = torch.zeros(count, dtype=torch.bool)
    held[torch.randperm(count, generator=torch.Generator().manual_seed(0))[: round(count * share)]] = True
    return held
