"""Labelled images from a name: batches for training and validation.

Letters: N images, C channels, H rows, W columns, S the side of a square image.
"""

import difflib
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffprune.errors import BadData
from diffprune.models import called, imported

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MNIST = ((0.1307,), (0.3081,))
DIGITS = ((0.305,), (0.376,))
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PICTURES = (".png", ".jpg", ".jpeg")
MOST_CLASSES = 1_000_000  # a label beyond is not a class, and would fill the memory with names
UNSTARTED = "nothing was started"

Read = Callable[[Tensor], Tensor]  # indices (n,) to images (n, C, H, W), as stored: uint8 or float32
Augment = Callable[[Tensor, torch.Generator], Tensor]  # images to images of the same shape and dtype


@dataclass(frozen=True)
class Batches:
    """Batches of (images (N, C, H, W) float32, labels (N,) int64), to be iterated as often as needed.

    examples: how many images one pass gives at most. batches: how many batches. start: begins one pass.
    """

    examples: int
    batches: int
    start: Callable[[], Iterator[tuple[Tensor, Tensor]]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
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
    """Half of a data set as it is stored; labels (N,) int64."""

    read: Read
    labels: Tensor


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


def load_data(
    spec: str, *, image_size: int | None = None, batch: int = 128, seed: int = 0, augment: bool = True
) -> Data:
    """The data that `spec` names.

    - `digits`: scikit-learn's 1,797 digits, a quarter held out, 1 channel, S = 16.
    - `cifar10:PATH`: train_1.npz to train_5.npz and test.npz with `images` (N, 32, 32, 3) uint8 and `labels` (N,).
    - `mnist:PATH`: the unpacked idx files in PATH/MNIST/raw.
    - `imagefolder:PATH`: PATH/train/CLASS/ and PATH/val/CLASS/, or PATH/CLASS/ of which a fifth is held out; S = 224.
      The shorter side becomes 256/224 of S, then the centre is cropped, as for torchvision's ImageNet weights.
    - `npz:PATH`: train_images, train_labels, val_images, val_labels. uint8 (N, H, W, C) becomes 0..1 and is normalised
      by `mean` and `std` (C,) of the file, or else of the training images; float (N, C, H, W) is left as it is.
    - `package.module:function`: what the user's function returns, `(train, val)` or `Data`. This imports and runs the
      user's code. The batches of `(train, val)` are read once from end to end, to check and count them.

    `image_size` resizes stored arrays to squares. `augment` changes what is trained on: for cifar10 a crop out of the
    image padded by 4 and a flip, for imagefolder a flip. Nothing is ever unpickled.

    Raises:
        BadData: the data is unknown, missing, damaged, of the wrong shape, or has labels that are no class indices.
    """
    name, _, path = spec.partition(":")
    if spec == "digits":
        source = _digits()
    elif name in FOLDERS and path:
        source = FOLDERS[name](Path(path), 224 if image_size is None else image_size)
    elif ":" not in spec or name in FOLDERS or name == "digits":
        known = ["digits", *(f"{known}:PATH" for known in FOLDERS), "package.module:function"]
        nearest = difflib.get_close_matches(spec, known, n=1)
        raise _bad(
            f"there is no data {spec!r}",
            spec,
            f"did you mean {nearest[0]}?" if nearest else f"one of {', '.join(known)}",
        )
    else:
        return _from_user(spec, image_size)
    size = 16 if spec == "digits" and image_size is None else image_size
    return _data(source, size=size, batch=batch, seed=seed, augment=augment)


def _bad(fact: str, at: object, fix: str) -> BadData:
    return BadData(fact, at=str(at), effect=UNSTARTED, fix=fix)


# From stored images to batches


def _data(source: Source, *, size: int | None, batch: int, seed: int, augment: bool) -> Data:
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
    parts = _parts(torch.arange(len(side.labels)), batch)

    def start() -> Iterator[tuple[Tensor, Tensor]]:
        return ((prepare(side.read(part)), side.labels[part]) for part in parts)

    return Batches(examples=len(side.labels), batches=len(parts), start=start)


def _shuffled(
    side: Side, prepare: Callable[[Tensor], Tensor], augment: Augment | None, *, batch: int, seed: int
) -> Batches:
    passes = torch.Generator().manual_seed(seed)
    count = len(side.labels)
    # The rest that does not fill a batch is left out: batch norm would take its statistics over a handful of images.
    # The next pass has another order, so nothing is left out for good.
    batches = max(1, count // batch)

    def start() -> Iterator[tuple[Tensor, Tensor]]:
        # A generator of its own for each pass: one that is given up half-way does not change the next.
        draw = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=passes)))
        for part in _parts(torch.randperm(count, generator=draw), batch)[:batches]:
            images = side.read(part)
            yield prepare(images if augment is None else augment(images, draw)), side.labels[part]

    return Batches(examples=count, batches=batches, start=start)


def _flipped(images: Tensor, draw: torch.Generator) -> Tensor:
    """Half of the images, mirrored left to right."""
    flip = torch.rand(len(images), 1, 1, 1, generator=draw) < 0.5
    return torch.where(flip, images.flip(3), images)


def _cropped_and_flipped(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels each way over a black border, half of them mirrored."""
    count, _, height, width = images.shape
    top, left = torch.randint(9, (2, count), generator=draw)
    windows = F.pad(images, (4, 4, 4, 4)).unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 9, 9, H, W), a view
    return _flipped(windows[torch.arange(count), :, top, left], draw)


def _held_out(count: int, share: float) -> Tensor:
    """Which of `count` examples (count,) bool are held out: the same ones in every run, whatever its seed."""
    held = torch.zeros(count, dtype=torch.bool)
    held[torch.randperm(count, generator=torch.Generator().manual_seed(0))[: round(count * share)]] = True
    return held


# Stored arrays


def _side(images: Tensor, labels: NDArray[Any], at: str) -> Side:
    """Images (N, C, H, W) in memory with their labels, both checked."""
    if labels.ndim != 1 or len(labels) != len(images):
        fix = "give one label for each image"
        raise _bad(f"{len(images)} images but labels of shape {labels.shape}", at, fix)
    if not len(labels):
        raise _bad("there are no images", at, "give at least one image for training and one for validation")
    if not np.issubdtype(labels.dtype, np.integer):
        raise _bad(f"labels are {labels.dtype}, not integers", at, "number the classes from 0")
    if not 0 <= int(labels.min()) <= int(labels.max()) < MOST_CLASSES:
        raise _bad(f"labels go from {labels.min()} to {labels.max()}", at, "number the classes from 0")
    return Side(read=images.__getitem__, labels=torch.from_numpy(labels.astype(np.int64)))


def _below(sides: Iterable[Side], classes: int, at: object) -> None:
    highest = max(int(side.labels.max()) for side in sides)
    if highest >= classes:
        fact = f"a label is {highest}, but there are {classes} classes"
        raise _bad(fact, at, f"number the classes from 0 to {classes - 1}")


def _arrays(path: Path, needed: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """All arrays of an npz file, without ever unpickling one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as cause:
        missing = isinstance(cause, FileNotFoundError)
        # numpy takes whatever it does not know for a pickle and proposes to allow that, which is never done here.
        reason = "it is not an npz file" if "unsafely" in str(cause) else cause
        raise _bad(
            "the file is missing" if missing else f"the file cannot be read: {reason}",
            path,
            "check the path" if missing else "write it again with numpy.savez, from arrays of numbers",
        ) from cause
    absent = [key for key in needed if key not in arrays]
    if absent:
        has = ", ".join(arrays) or "none"
        raise _bad(f"arrays missing: {', '.join(absent)}; the file has {has}", path, "write it again with these arrays")
    return arrays


def _digits() -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as cause:
        fact = "the digits come with scikit-learn, which is not installed"
        raise _bad(fact, "digits", "pip install diffprune[demo]") from cause
    stored = load_digits()
    images = torch.from_numpy(stored.images).float().div_(16).unsqueeze(1)
    held = np.zeros(len(images), dtype=bool)
    for digit in range(10):
        of_digit = np.flatnonzero(stored.target == digit)
        held[of_digit[_held_out(len(of_digit), 0.25).numpy()]] = True
    train, val = (_side(images[torch.from_numpy(part)], stored.target[part], "digits") for part in (~held, held))
    return Source(train, val, tuple("0123456789"), (1, 8, 8), *DIGITS)


def _cifar10(path: Path, _size: int) -> Source:
    names = (*(f"train_{number}.npz" for number in range(1, 6)), "test.npz")
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise _bad(
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
            raise _bad(fact, path / name, "other images go into one file, given as npz:PATH")
        _side(torch.from_numpy(images), labels, str(path / name))
        sides.append((images, labels))
    stored = [np.concatenate(half) for half in zip(*sides[:5], strict=True)]
    train, val = (
        _side(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels, str(path))
        for images, labels in (stored, sides[5])
    )
    _below((train, val), 10, path)
    return Source(train, val, CIFAR10, (3, 32, 32), *IMAGENET, augment=_cropped_and_flipped)


def _mnist(path: Path, _size: int) -> Source:
    raw = path / "MNIST" / "raw"
    sides = []
    for name in ("train", "t10k"):
        images = _idx(raw / f"{name}-images-idx3-ubyte", 3)
        if images.shape[1:] != (28, 28):
            fact = f"images are {images.shape[1:]}, not (28, 28)"
            raise _bad(fact, raw / f"{name}-images-idx3-ubyte", "other images go into one file, given as npz:PATH")
        labels = _idx(raw / f"{name}-labels-idx1-ubyte", 1)
        sides.append(_side(torch.from_numpy(images).unsqueeze(1), labels, str(raw / f"{name}-*")))
    train, val = sides
    _below(sides, 10, raw)
    return Source(train, val, tuple("0123456789"), (1, 28, 28), *MNIST)


def _idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes: two zeros, 8 for the type, the number of axes, their lengths, the values."""
    try:
        content = path.read_bytes()
    except OSError as cause:
        fix = "give the folder above MNIST/raw, with its four files unpacked"
        raise _bad(f"the file cannot be read: {cause.strerror}", path, fix) from cause
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis]) for axis in range(axes)]
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) != start + math.prod(shape):
        fact = f"the file is damaged: not {axes} axes of unsigned bytes, or {len(content)} bytes do not fit them"
        raise _bad(fact, path, "download and unpack it again")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()


def _npz(path: Path, _size: int) -> Source:
    arrays = _arrays(path, ("train_images", "train_labels", "val_images", "val_labels"))
    images = {half: _channels_first(arrays[f"{half}_images"], f"{half}_images in {path}") for half in ("train", "val")}
    train, val = (_side(images[half], arrays[f"{half}_labels"], f"{half} in {path}") for half in ("train", "val"))
    found = {half: (tuple(values.shape[1:]), values.dtype) for half, values in images.items()}
    if found["train"] != found["val"]:
        fact = f"training images are {found['train']}, validation images {found['val']}"
        raise _bad(fact, path, "make (C, H, W) and dtype the same on both sides")
    channels, height, width = images["train"].shape[1:]
    mean, std = (0.0,) * channels, (1.0,) * channels
    if images["train"].dtype == torch.uint8:
        mean, std = _statistics(arrays, images["train"], path)
    classes = 1 + max(int(side.labels.max()) for side in (train, val))
    return Source(train, val, tuple(map(str, range(classes))), (channels, height, width), mean, std)


def _channels_first(images: NDArray[Any], at: str) -> Tensor:
    """uint8 (N, H, W, C) or float (N, C, H, W) to (N, C, H, W) uint8 or float32."""
    whole = images.dtype == np.uint8
    if images.ndim != 4 or not (whole or np.issubdtype(images.dtype, np.floating)) or 0 in images.shape[1:]:
        fact = f"images are {images.shape} {images.dtype}"
        raise _bad(fact, at, "give uint8 (N, H, W, C) or float (N, C, H, W)")
    if (whole and images.shape[3] > 4) or (not whole and images.shape[1] > 4 >= images.shape[3]):
        fact = f"images are {images.shape} {images.dtype}, with the channels on the wrong axis"
        raise _bad(fact, at, "uint8 has its channels, at most 4, last, (N, H, W, C); float first, (N, C, H, W)")
    if whole:
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    if not np.isfinite(images).all():
        raise _bad("images hold values that are not finite numbers", at, "replace NaN and infinity")
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
            raise _bad(fact, path, f"give both, of shape ({channels},), std above 0, or neither")
    else:
        values = np.arange(256) / 255
        counts = np.stack([np.bincount(channel.flatten().numpy(), minlength=256) for channel in images.unbind(1)])
        share = counts / counts.sum(1, keepdims=True)
        mean = share @ values
        std = np.sqrt(share @ values**2 - mean**2)
        std = np.where(std > 1e-6, std, 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())


# Folders of pictures


def _imagefolder(path: Path, size: int) -> Source:
    if not path.is_dir():
        raise _bad("the folder is missing", path, "give a folder with train/CLASS/ and val/CLASS/, or with CLASS/")
    train, val = path / "train", path / "val"
    if train.is_dir() != val.is_dir():
        absent = "val" if train.is_dir() else "train"
        raise _bad(f"the folder {absent} is missing", path, "give both train and val, or only folders of classes")
    if train.is_dir():
        labels = _classes(train, path)
        unknown = set(_classes(val, path)) - set(labels)
        if unknown:
            raise _bad(f"classes only in val: {', '.join(sorted(unknown))}", path, "give train the same classes")
        files = [
            [(file, index) for index, label in enumerate(labels) for file in _pictures(half / label)]
            for half in (train, val)
        ]
    else:
        labels = _classes(path, path)
        files = [[], []]
        for index, label in enumerate(labels):
            found = _pictures(path / label)
            for file, held in zip(found, _held_out(len(found), 0.2).tolist(), strict=True):
                files[held].append((file, index))
        if not files[1]:
            fact = "no class has the 3 pictures that it takes to hold one out"
            raise _bad(fact, path, "add pictures, or divide them into train and val")
    train_side, val_side = (
        Side(_decoded([file for file, _ in half], path, size), torch.tensor([index for _, index in half]))
        for half in files
    )
    return Source(train_side, val_side, labels, (3, size, size), *IMAGENET, augment=_flipped)


def _classes(folder: Path, root: Path) -> tuple[str, ...]:
    """The names of the folders of classes, sorted; none of them empty."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    empty = [name for name in names if not _pictures(folder / name)]
    if not names or empty:
        where = (folder / empty[0] if empty else folder).relative_to(root)
        fact = f"there are no {'pictures' if empty else 'folders of classes'} in {where}"
        raise _bad(fact, root, f"put {', '.join(PICTURES)} files into a folder for each class")
    return tuple(names)


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.suffix.lower() in PICTURES) if folder.is_dir() else []


def _decoded(files: list[Path], root: Path, size: int) -> Read:
    def read(indices: Tensor) -> Tensor:
        return torch.stack([_picture(files[index], root, size) for index in indices.tolist()])

    return read


def _picture(file: Path, root: Path, size: int) -> Tensor:
    """The centre of a picture, (3, size, size) uint8."""
    try:
        with Image.open(file) as opened:
            whole = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as cause:
        reason = str(cause).replace(str(file), file.name)
        fact = f"the picture {file.relative_to(root)} cannot be read: {reason}"
        raise BadData(fact, at=str(root), effect="the run stopped", fix="mend or remove the picture") from cause
    scale = size * 256 / 224 / min(whole.size)
    width, height = (max(size, round(side * scale)) for side in whole.size)
    left, top = (width - size) // 2, (height - size) // 2
    centre = whole.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(centre)).permute(2, 0, 1)


FOLDERS: dict[str, Callable[[Path, int], Source]] = {
    "cifar10": _cifar10,
    "mnist": _mnist,
    "imagefolder": _imagefolder,
    "npz": _npz,
}


# The user's own


def _from_user(spec: str, image_size: int | None) -> Data:
    given = called(spec, imported(spec, BadData), BadData)
    if isinstance(given, Data):
        data = given
    elif isinstance(given, tuple | list) and len(given) == 2:
        train, val = (_checked(half, f"{name} of {spec}") for half, name in zip(given, ("train", "val"), strict=True))
        if train[1] != val[1]:
            raise _bad(f"training images are {train[1]}, validation images {val[1]}", spec, "make (C, H, W) the same")
        channels, labels = train[1][0], tuple(map(str, range(max(train[2], val[2]) + 1)))
        data = Data(train[0], val[0], labels, train[1], (0.0,) * channels, (1.0,) * channels)
    else:
        fact = f"the function returned {type(given).__name__}, not (train, val) or a diffprune Data"
        raise _bad(fact, spec, "return two iterables of batches (images, labels)")
    if image_size is not None and data.input_shape[1:] != (image_size, image_size):
        fact = f"image size {image_size} was asked for; the function gives {data.input_shape}"
        raise _bad(fact, spec, "leave the image size out, or let the function give that size")
    return data


def _checked(given: Any, at: str) -> tuple[Batches, tuple[int, int, int], int]:
    """The user's batches, their (C, H, W) and the highest label, from one whole pass."""
    fix = "return an iterable, such as a torch DataLoader, that gives the batches anew each time it is iterated"
    if not isinstance(given, Iterable):
        raise _bad(f"{type(given).__name__} is not a series of batches", at, fix)
    if isinstance(given, Iterator):
        raise _bad(f"{type(given).__name__} can be iterated only once", at, fix)
    examples = batches = highest = 0
    shape: tuple[int, ...] | None = None
    for batch in given:
        images, labels = _pair(batch, at)
        if shape not in (None, tuple(images.shape[1:])):
            raise _bad(f"images are {shape}, then {tuple(images.shape[1:])}", at, "give images of one size")
        shape = tuple(images.shape[1:])
        examples, batches, highest = examples + len(labels), batches + 1, max(highest, int(labels.max()))
    if shape is None:
        raise _bad("there are no batches", at, fix)

    def start() -> Iterator[tuple[Tensor, Tensor]]:
        return (_pair(batch, at) for batch in given)

    channels, height, width = shape
    return Batches(examples, batches, start), (channels, height, width), highest


def _pair(batch: Any, at: str) -> tuple[Tensor, Tensor]:
    """A user's batch as (images float32, labels int64)."""
    images, labels = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (None, None)
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise _bad("a batch is not a pair of tensors", at, "give (images, labels)")
    if images.ndim != 4 or not images.is_floating_point() or labels.shape != images.shape[:1] or not len(labels):
        fact = f"images are {tuple(images.shape)} {images.dtype}, labels {tuple(labels.shape)}"
        raise _bad(fact, at, "give float images (N, C, H, W) and labels (N,)")
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or not 0 <= int(labels.min()) <= int(labels.max()) < MOST_CLASSES:
        fact = f"labels are {labels.dtype}, from {labels.min()} to {labels.max()}"
        raise _bad(fact, at, "number the classes from 0, as integers")
    return images.float(), labels.long()
