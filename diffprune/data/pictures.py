"""Data sets that are folders of pictures, one for each class."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffprune.data.batches import IMAGENET, Read, Side, Source, bad_data, flipped, held_out
from diffprune.errors import BadData

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def imagefolder(path: Path, size: int) -> Source:
    if not path.is_dir():
        raise bad_data("the folder is missing", path, "give a folder with train/CLASS/ and val/CLASS/, or with CLASS/")
    train, val = path / "train", path / "val"
    if train.is_dir() != val.is_dir():
        absent = "val" if train.is_dir() else "train"
        raise bad_data(f"the folder {absent} is missing", path, "give both train and val, or only folders of classes")
    if train.is_dir() and _pictures(train) and not _folders(train):
        return _without_labels(path, size)
    if train.is_dir():
        labels = _classes(train, path)
        unknown = set(_classes(val, path)) - set(labels)
        if unknown:
            raise bad_data(f"classes only in val: {', '.join(sorted(unknown))}", path, "give train the same classes")
        files = [_labelled(half, labels) for half in (train, val)]
    else:
        labels = _classes(path, path)
        files = [[], []]
        for index, label in enumerate(labels):
            found = _pictures(path / label)
            for file, held in zip(found, held_out(len(found), 0.2).tolist(), strict=True):
                files[held].append((file, index))
        if not files[1]:
            fact = "no class has the 3 pictures that it takes to hold one out"
            raise bad_data(fact, path, "add pictures, or divide them into train and val")
    return _source(_side(files[0], path, size), _side(files[1], path, size), labels, size)


def _without_labels(path: Path, size: int) -> Source:
    """Pictures in train itself, and val with a folder for each class."""
    labels, found = _classes(path / "val", path), _pictures(path / "train")
    held = _side(_labelled(path / "val", labels), path, size)
    return _source(Side(_decoded(found, path, size), len(found), None), held, labels, size)


def _labelled(folder: Path, labels: tuple[str, ...]) -> list[tuple[Path, int]]:
    return [(file, index) for index, label in enumerate(labels) for file in _pictures(folder / label)]


def _source(train: Side, val: Side, labels: tuple[str, ...], size: int) -> Source:
    return Source(train, val, labels, (3, size, size), *IMAGENET, augment=flipped)


def _side(files: list[tuple[Path, int]], root: Path, size: int) -> Side:
    indices = torch.tensor([index for _, index in files])
    return Side(_decoded([file for file, _ in files], root, size), len(files), indices)


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _classes(folder: Path, root: Path) -> tuple[str, ...]:
    """The names of the folders of classes, sorted; none of them empty."""
    names = _folders(folder)
    empty = [name for name in names if not _pictures(folder / name)]
    if not names or empty:
        where = (folder / empty[0] if empty else folder).relative_to(root)
        fact = f"there are no {'pictures' if empty else 'folders of classes'} in {where}"
        raise bad_data(fact, root, f"put {', '.join(PICTURES)} files into a folder for each class")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as cause:
            fact = f"the name of the class folder {name!r} is not UTF-8, so no file can hold it"
            raise bad_data(fact, root, "rename the folder") from cause
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
            if opened.mode.startswith(("I", "F")):
                raise ValueError("its pixels have more than 8 bits, and which of them to keep is not known")
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
