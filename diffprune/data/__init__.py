"""Labelled images from a name: batches for training and validation."""

import difflib
from collections.abc import Callable
from pathlib import Path

from diffprune.data.arrays import cifar10, digits, mnist, npz
from diffprune.data.batches import Batches, Data, Source, bad_data, batched
from diffprune.data.own import from_user
from diffprune.data.pictures import imagefolder

__all__ = ["Batches", "Data", "load_data"]

FOLDERS: dict[str, Callable[[Path, int], Source]] = {
    "cifar10": cifar10,
    "mnist": mnist,
    "imagefolder": imagefolder,
    "npz": npz,
}


def makes_batches(spec: str) -> bool:
    """Whether the data is a function of the user's, which decides itself how large its batches are."""
    name, colon, _ = spec.partition(":")
    return bool(colon) and name not in (*FOLDERS, "digits")


def load_data(
    spec: str, *, image_size: int | None = None, batch: int | None = None, seed: int = 0, augment: bool = True
) -> Data:
    """The data that `spec` names.

    - `digits`: scikit-learn's 1,797 digits, a quarter held out, 1 channel, S = 16.
    - `cifar10:PATH`: train_1.npz to train_5.npz and test.npz with `images` (N, 32, 32, 3) uint8 and `labels` (N,).
    - `mnist:PATH`: the unpacked idx files in PATH/MNIST/raw.
    - `imagefolder:PATH`: PATH/train/CLASS/ and PATH/val/CLASS/, or PATH/CLASS/ of which a fifth is held out; S = 224.
      The shorter side becomes 256/224 of S, then the centre is cropped, as for torchvision's ImageNet weights.
      Pictures in PATH/train itself have no labels.
    - `npz:PATH`: train_images, perhaps train_labels, val_images, val_labels. uint8 (N, H, W, C) becomes 0..1 and is
      normalised by `mean` and `std` (C,) of the file, or else of the training images; float (N, C, H, W) is left as it
      is.
    - `package.module:function`: what the user's function returns, `(train, val)` or `Data`. This imports and runs the
      user's code, which says how large batches are, whatever `batch` is. Those of `(train, val)` are read once from end
      to end, to check and count them.

    Without labels to train on, `compress` learns from the dense network's answers alone.

    `batch` is 128 by default. `image_size` resizes stored arrays to squares. `augment` changes what is trained on: for
    cifar10 a crop out of the image padded by 4 and a flip, for imagefolder a flip. Nothing is ever unpickled.

    Raises:
        BadData: the data is unknown, missing, damaged, of the wrong shape, or has labels that are no class indices.
    """
    name, _, path = spec.partition(":")
    if batch is not None and batch < 1:
        raise bad_data(f"batches of {batch} images were asked for", spec, "give 1 or more")
    if spec == "digits":
        source = digits()
    elif name in FOLDERS and path:
        source = FOLDERS[name](Path(path), 224 if image_size is None else image_size)
    elif ":" not in spec or name in FOLDERS or name == "digits":
        known = ["digits", *(f"{known}:PATH" for known in FOLDERS), "package.module:function"]
        nearest = difflib.get_close_matches(spec, known, n=1)
        raise bad_data(
            f"there is no data {spec!r}",
            spec,
            f"did you mean {nearest[0]}?" if nearest else f"one of {', '.join(known)}",
        )
    else:
        return from_user(spec, image_size)
    size = 16 if spec == "digits" and image_size is None else image_size
    return batched(source, size=size, batch=128 if batch is None else batch, seed=seed, augment=augment)
