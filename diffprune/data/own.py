"""Data that a function of the user's returns."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffprune.data.batches import MOST_CLASSES, Batches, Data, bad_data
from diffprune.errors import BadData
from diffprune.feeding import ending
from diffprune.importing import called, imported

AGAIN = "return an iterable, such as a torch DataLoader, that gives the batches anew each time it is iterated"


def from_user(spec: str, image_size: int | None) -> Data:
    given = called(spec, imported(spec, BadData), BadData)
    if isinstance(given, Data):
        data = _plain(given, spec)
    elif isinstance(given, tuple | list) and len(given) == 2:
        train, val = (_checked(half, f"{name} of {spec}") for half, name in zip(given, ("train", "val"), strict=True))
        if val[2] is None:
            raise bad_data("validation batches have no labels", spec, "give (images, labels): they tell the accuracy")
        if train[1] != val[1]:
            raise bad_data(
                f"training images are {train[1]}, validation images {val[1]}", spec, "make (C, H, W) the same"
            )
        channels, labels = train[1][0], tuple(map(str, range(max(train[2] or 0, val[2]) + 1)))
        data = Data(train[0], val[0], labels, train[1], (0.0,) * channels, (1.0,) * channels)
    else:
        fact = f"the function returned {type(given).__name__}, not (train, val) or a diffprune Data"
        raise bad_data(fact, spec, "return two iterables of batches (images, labels)")
    if image_size is not None and data.input_shape[1:] != (image_size, image_size):
        fact = f"image size {image_size} was asked for; the function gives {data.input_shape}"
        raise bad_data(fact, spec, "leave the image size out, or let the function give that size")
    return data


def _plain(given: Data, at: str) -> Data:
    """The same with Python's own numbers and words, as JSON takes them, in place of numpy's or torch's."""
    try:
        mean, std = (tuple(map(float, values)) for values in (given.mean, given.std))
        channels, height, width = map(int, given.input_shape)
    except (TypeError, ValueError) as error:
        fact = f"input_shape {given.input_shape}, mean {given.mean} or std {given.std} are not numbers, one per channel"
        raise bad_data(fact, at, "give (C, H, W), and C numbers each") from error
    for batches, kind in ((given.train, "training"), (given.val, "validation")):
        if isinstance(batches, Iterator) or next(iter(batches), None) is None:
            raise bad_data(f"there are no {kind} batches, or only once", at, AGAIN)
    shape, labels = (channels, height, width), tuple(map(str, given.labels))
    return replace(given, labels=labels, input_shape=shape, mean=mean, std=std)


def _checked(given: Any, at: str) -> tuple[Batches, tuple[int, int, int], int | None]:
    """The user's batches, their (C, H, W) and the highest label, if there are any, from one whole pass."""
    if not isinstance(given, Iterable):
        raise bad_data(f"{type(given).__name__} is not a series of batches", at, AGAIN)
    if isinstance(given, Iterator):
        raise bad_data(f"{type(given).__name__} can be iterated only once", at, AGAIN)
    examples = batches = 0
    highest: int | None = None
    shape: tuple[int, ...] | None = None
    for batch in ending(given):
        images, labels = _pair(batch, at)
        if shape not in (None, tuple(images.shape[1:])):
            raise bad_data(f"images are {shape}, then {tuple(images.shape[1:])}", at, "give images of one size")
        shape = tuple(images.shape[1:])
        examples, batches = examples + len(images), batches + 1
        if labels is not None:
            highest = max(highest or 0, int(labels.max()))
    if shape is None:
        raise bad_data("there are no batches", at, AGAIN)

    def start() -> Iterator[tuple[Tensor, Any]]:
        return (_pair(batch, at) for batch in given)

    channels, height, width = shape
    return Batches(examples, batches, start), (channels, height, width), highest


def _pair(batch: Any, at: str) -> tuple[Tensor, Tensor | None]:
    """A user's batch as (images float32, labels int64), without labels where there are none."""
    parts: Any = (batch,) if isinstance(batch, Tensor) else batch
    match parts:
        case (Tensor() as images,) | (Tensor() as images, None):
            return _images(images, at), None
        case (Tensor() as images, Tensor() as labels):
            return _images(images, at), _labels(labels, len(images), at)
    raise bad_data("a batch is no pair of tensors, nor images alone", at, "give (images, labels), or images")


def _images(images: Tensor, at: str) -> Tensor:
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise bad_data(f"images are {tuple(images.shape)} {images.dtype}", at, "give float images (N, C, H, W)")
    return images.float()


def _labels(labels: Tensor, count: int, at: str) -> Tensor:
    if labels.shape != (count,):
        raise bad_data(f"labels are {tuple(labels.shape)} for {count} images", at, "give one label for each image")
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or not 0 <= int(labels.min()) <= int(labels.max()) < MOST_CLASSES:
        fact = f"labels are {labels.dtype}, from {labels.min()} to {labels.max()}"
        raise bad_data(fact, at, "number the classes from 0, as integers")
    return labels.long()
