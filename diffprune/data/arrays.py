"""Data sets that are stored as arrays: scikit-learn's digits, CIFAR-10, MNIST and npz files."""

import math
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffprune.data.batches import IMAGENET, MOST_CLASSES, Side, Source, bad_data, cropped_and_flipped, held_out

MNIST = ((0.1307,), (0.3081,))
DIGITS = ((0.305,), (0.376,))
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def side(images: Tensor, labels: NDArray[Any] | None, at: str) -> Side:
    """Images (N, C, H, W) in memory with their labels, if there are any, both checked."""
    if not len(images):
        raise bad_data("there are no images", at, "give at least one image for training and one for validation")
    if labels is None:
        return Side(images.__getitem__, len(images), None)
    if labels.ndim != 1 or len(labels) != len(images):
        fix = "give one label for each image"
        raise bad_data(f"{len(images)} images but labels of shape {labels.shape}", at, fix)
    if not np.issubdtype(labels.dtype, np.integer):
        raise bad_data(f"labels are {labels.dtype}, not integers", at, "number the classes from 0")
    if not 0 <= int(labels.min()) <= int(labels.max()) < MOST_CLASSES:
        raise bad_data(f"labels go from {labels.min()} to {labels.max()}", at, "number the classes from 0")
    return Side(images.__getitem__, len(images), torch.from_numpy(labels.astype(np.int64)))


def _highest(sides: Iterable[Side]) -> int:
    return max(int(side.labels.max()) for side in sides if side.labels is not None)


def _below(sides: Iterable[Side], classes: int, at: object) -> None:
    highest = _highest(sides)
    if highest >= classes:
        fact = f"a label is {highest}, but there are {classes} classes"
        raise bad_data(fact, at, f"number the classes from 0 to {classes - 1}")


def _arrays(path: Path, needed: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """All arrays of an npz file, without ever unpickling one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as cause:
        missing = isinstance(cause, FileNotFoundError)
        # numpy takes whatever it does not know for a pickle and proposes to allow that, which is never done here.
        reason = "it is not an npz file" if "unsafely" in str(cause) else cause
        raise bad_data(
            "the file is missing" if missing else f"the file cannot be read: {reason}",
            path,
            "check the path" if missing else "write it again with numpy.savez, from arrays of numbers",
        ) from cause
    absent = [key for key in needed if key not in arrays]
    if absent:
        has = ", ".join(arrays) or "none"
        raise bad_data(
            f"arrays missing: {', '.join(absent)}; the file has {has}", path, "write it again with these arrays"
        )
    return arrays


def digits() -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as cause:
        fact = "the digits come with scikit-learn, which is not installed"
        raise bad_data(fact, "digits", "pip install diffprune[demo]") from cause
    stored = load_digits()
    images = torch.from_numpy(stored.images).float().div_(16).unsqueeze(1)
    held = np.zeros(len(images), dtype=bool)
    for digit in range(10):
        of_digit = np.flatnonzero(stored.target == digit)
        held[of_digit[held_out(len(of_digit), 0.25).numpy()]] = True
    train, val = (side(images[torch.from_numpy(part)], stored.target[part], "digits") for part in (~held, held))
    return Source(train, val, tuple("0123456789"), (1, 8, 8), *DIGITS)


def cifar10(path: Path, _size: int) -> Source:
    names = (*(f"train_{number}.npz" for number in range(1, 6)), "test.npz")
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise bad_data(
            f"files missing: {', '.join(absent)}",
            path,
            "write images (N, 32, 32, 3) uint8 and labels (N,) into these files with numpy.savez; the pickles of "
            "cifar-10-batches-py are not read, because unpickling can run any code",
        )
    sides: list[tuple[NDArray[Any], NDArray[Any]]] = []
    for name in names:
        arrays = _arrays(path / name, ("images", "labels"))
        images, labels = arrays["images"], arrays["labels"]
        if images.shape[1:] != (32, 32, 3) or images.dtype != np.uint8:
            fact = f"images are {images.shape} {images.dtype}, not (N, 32, 32, 3) uint8"
            raise bad_data(fact, path / name, "other images go into one file, given as npz:PATH")
        side(torch.from_numpy(images), labels, str(path / name))
        sides.append((images, labels))
    stored = [np.concatenate(half) for half in zip(*sides[:5], strict=True)]
    train, val = (
        side(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels, str(path))
        for images, labels in (stored, sides[5])
    )
    _below((train, val), 10, path)
    return Source(train, val, CIFAR10, (3, 32, 32), *IMAGENET, augment=cropped_and_flipped)


def mnist(path: Path, _size: int) -> Source:
    raw = path / "MNIST" / "raw"
    sides = []
    for name in ("train", "t10k"):
        images = _idx(raw / f"{name}-images-idx3-ubyte", 3)
        if images.shape[1:] != (28, 28):
            fact = f"images are {images.shape[1:]}, not (28, 28)"
            raise bad_data(fact, raw / f"{name}-images-idx3-ubyte", "other images go into one file, given as npz:PATH")
        labels = _idx(raw / f"{name}-labels-idx1-ubyte", 1)
        sides.append(side(torch.from_numpy(images).unsqueeze(1), labels, str(raw / f"{name}-*")))
    train, val = sides
    _below(sides, 10, raw)
    return Source(train, val, tuple("0123456789"), (1, 28, 28), *MNIST)


def _idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes: two zeros, 8 for the type, the number of axes, their lengths, the values."""
    try:
        content = path.read_bytes()
    except OSError as cause:
        fix = "give the folder above MNIST/raw, with its four files unpacked"
        raise bad_data(f"the file cannot be read: {cause.strerror}", path, fix) from cause
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis]) for axis in range(axes)]
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) != start + math.prod(shape):
        fact = f"the file is damaged: not {axes} axes of unsigned bytes, or {len(content)} bytes do not fit them"
        raise bad_data(fact, path, "download and unpack it again")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()


def npz(path: Path, _size: int) -> Source:
    arrays = _arrays(path, ("train_images", "val_images", "val_labels"))
    images = {half: _channels_first(arrays[f"{half}_images"], f"{half}_images in {path}") for half in ("train", "val")}
    train, val = (side(images[half], arrays.get(f"{half}_labels"), f"{half} in {path}") for half in ("train", "val"))
    found = {half: (tuple(values.shape[1:]), values.dtype) for half, values in images.items()}
    if found["train"] != found["val"]:
        fact = f"training images are {found['train']}, validation images {found['val']}"
        raise bad_data(fact, path, "make (C, H, W) and dtype the same on both sides")
    channels, height, width = images["train"].shape[1:]
    mean, std = (0.0,) * channels, (1.0,) * channels
    if images["train"].dtype == torch.uint8:
        mean, std = _statistics(arrays, images["train"], path)
    return Source(train, val, tuple(map(str, range(1 + _highest((train, val))))), (channels, height, width), mean, std)


def _channels_first(images: NDArray[Any], at: str) -> Tensor:
    """uint8 (N, H, W, C) or float (N, C, H, W) to (N, C, H, W) uint8 or float32."""
    whole = images.dtype == np.uint8
    if images.ndim != 4 or not (whole or np.issubdtype(images.dtype, np.floating)) or 0 in images.shape[1:]:
        fact = f"images are {images.shape} {images.dtype}"
        raise bad_data(fact, at, "give uint8 (N, H, W, C) or float (N, C, H, W)")
    if (whole and images.shape[3] > 4) or (not whole and images.shape[1] > 4 >= images.shape[3]):
        fact = f"images are {images.shape} {images.dtype}, with the channels on the wrong axis"
        raise bad_data(fact, at, "uint8 has its channels, at most 4, last, (N, H, W, C); float first, (N, C, H, W)")
    if whole:
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    if not np.isfinite(images).all():
        raise bad_data("images hold values that are not finite numbers", at, "replace NaN and infinity")
    return torch.from_numpy(images.astype(np.float32))


def _statistics(
    arrays: dict[str, NDArray[Any]], images: Tensor, path: Path
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel: those in the file, or else of the training images; a constant channel has std 1."""
    channels = images.shape[1]
    if "mean" in arrays or "std" in arrays:
        mean, std = (np.asarray(arrays.get(key, np.nan), dtype=np.float64) for key in ("mean", "std"))
        if mean.shape != (channels,) or std.shape != (channels,) or not np.isfinite(mean).all() or not (std > 0).all():
            fact = f"mean {mean.tolist()} and std {std.tolist()} do not normalise {channels} channels"
            raise bad_data(fact, path, f"give both, of shape ({channels},), std above 0, or neither")
    else:
        values = np.arange(256) / 255
        counts = np.stack([np.bincount(channel.flatten().numpy(), minlength=256) for channel in images.unbind(1)])
        share = counts / counts.sum(1, keepdims=True)
        mean = share @ values
        std = np.sqrt(share @ values**2 - mean**2)
        std = np.where(std > 1e-6, std, 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())
