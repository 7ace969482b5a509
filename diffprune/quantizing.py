"""Smaller still: the pruned network of a finished run in int8 or float16, and what that gains and costs, measured."""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import export
from diffprune import shipping
from diffprune.card import quantized_card
from diffprune.config import Config, load_config
from diffprune.data import Batches, Data, load_data
from diffprune.errors import BadConfig, BadData, BadRun
from diffprune.manifest import NAME, list_too, read_manifest
from diffprune.pruned import require_same_bytes
from diffprune.quantized import PRECISIONS, warnings
from diffprune.runfolder import as_json, require_files, write_atomically
from diffprune.training import Event
from export.recipes import TARGETS
from export.sessions import read_model

NEEDED = ("config.toml", "dense.onnx", "pruned.onnx")

CALIBRATION_IMAGES = 256
"""Enough to have seen the range of every activation; more images only add outliers, which coarsen the steps: a CIFAR-10
ResNet-20 kept 27.6 dB with 100 images, 27.3 with 300 and with 1,000, 26.9 with 2,000."""

CALIBRATION_BATCH = 32
"""Images that are calibrated on at once: without optimisations, so that every activation can be seen."""


def quantize_run(
    folder: Path,
    *,
    precision: str = "int8",
    target: str | None = None,
    data: str | None = None,
    on_event: Event = lambda event: None,
) -> dict[str, Any]:
    """Everything `diffprune quantize` does: RUN/pruned-PRECISION.onnx, its card, and a .json, which is returned.

    Calibrated with training images as they are, without augmentation; judged on the held-out ones. When all is measured
    the files take the places of older ones, one after the other, and the manifest lists them.

    Args:
        folder: what `run` has written.
        precision: int8 or fp16.
        target: x86 (the default), x86-vnni, x86-avx2 or tensorrt, see `export.quantize`; of int8 only.
        data: where the data of the run lies here: its files say the last name of an absolute path only.

    Raises:
        BadRun: the folder is not that of a finished run.
        BadConfig: an unknown precision or target. BadData: the data of the run is gone or damaged.
        NotQuantizable, BadOnnx: as `export.quantize`.
        NotReproducible: the file comes out otherwise the second time.
    """
    _require_known(precision, target)
    require_files(folder, NEEDED)
    config = load_config(folder / "config.toml")
    # A damaged manifest is found now, not when all is measured.
    origin = read_manifest(folder).origin if (folder / NAME).is_file() else None
    loaded = load_data(
        data or config.data, image_size=config.image_size, batch=config.batch, seed=config.seed, augment=False
    )
    _require_same_data(loaded, folder / "pruned.onnx")
    name = f"pruned-{precision}"
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadRun(
            "the folder cannot be written to", at=str(folder), effect="nothing was started",
            fix="copy the run into a folder of yours, or make this one yours",
        )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder, prefix=".quantize-") as drafts:
        files = {"dense": folder / "dense.onnx", "pruned": folder / "pruned.onnx"}
        draft = Path(drafts) / f"{name}.onnx"
        on_event({"phase": "calibrate"})
        small = _made_twice(files["pruned"], draft, list(_images(loaded.train)), precision, target or "x86")
        report = small.as_dict() | _measured(files | {precision: draft}, precision, loaded.val, config, on_event)
        report["warnings"] = list(warnings(report))
        done = [draft, write_atomically(Path(drafts) / f"{name}.json", as_json(report))]
        if origin:
            done.append(write_atomically(Path(drafts) / f"{name}.card.md", quantized_card(report, origin)))
        for file in done:
            os.replace(file, folder / file.name)
    if origin:
        list_too(folder, [file.name for file in done])
    return report


def _made_twice(source: Path, draft: Path, images: list[Tensor], precision: str, target: str) -> export.Quantized:
    """Write `draft`. Raises NotReproducible if it comes out otherwise the second time."""

    def made(path: Path) -> export.Quantized:
        if precision == "int8":
            return export.quantize(source, path, images, target=target)
        return export.to_fp16(source, path, images)

    with tempfile.TemporaryDirectory() as elsewhere:
        once = made(Path(elsewhere) / draft.name)
    small = made(draft)
    require_same_bytes(
        {draft.name: small.sha256}, {draft.name: once.sha256}, source=source.name,
        known="please report this with your versions of onnxruntime and onnx",
    )
    return small


def _require_known(precision: str, target: str | None) -> None:
    for option, value, known in (("precision", precision, PRECISIONS), ("target", target or "x86", TARGETS)):
        if value not in known:
            raise _bad_option(f"{option} {value!r} is not known", f"use one of {', '.join(known)}")
    if target and precision == "fp16":
        raise _bad_option("fp16 has no target: it is the same for all", "leave the target out, or ask for int8")


def _bad_option(fact: str, fix: str) -> BadConfig:
    return BadConfig(fact, at="quantize", effect="nothing was started", fix=fix)


def _unlike(said: str, value: list[Any]) -> bool:
    try:
        return bool(json.loads(said) != value)
    except ValueError:  # a file of others, that says something else under this name
        return True


def _require_same_data(data: Data, file: Path) -> None:
    """Classes, sizes and normalisation are those that the network was trained with, as far as its file says."""
    said = {entry.key: entry.value for entry in read_model(file).metadata_props}
    here = {"labels": data.labels, "input_shape": data.input_shape, "mean": data.mean, "std": data.std}
    for name, value in here.items():
        if name in said and _unlike(said[name], list(value)):
            raise BadData(
                f"the data has {name} {list(value)}, {file.name} says {said[name]}",
                at="quantize",
                effect="nothing was started: its accuracy would mean nothing",
                fix="give the data that the run was made with, with all its folders of classes and its mean and std",
            )


def _images(train: Batches) -> Iterator[Tensor]:
    left = CALIBRATION_IMAGES
    for images, _ in train:
        yield from images[:left].split(CALIBRATION_BATCH)
        left -= len(images)
        if left <= 0:
            return


def _measured(
    files: dict[str, Path], precision: str, val: Batches, config: Config, on_event: Event
) -> dict[str, Any]:
    """Size, accuracy and fidelity of the files, and the latency of each against the others."""
    on_event({"phase": "validate"})
    judged = _judged(files, precision, val, config.threads)
    on_event({"phase": "compare"})
    compared = {
        f"{one}_{other}": shipping.measured_pair(files[one], files[other], config).as_dict()
        for one, other in (("dense", "pruned"), ("dense", precision), ("pruned", precision))
    }
    return {"file_bytes": {key: file.stat().st_size for key, file in files.items()}, **judged, "latency": compared}


def _judged(files: dict[str, Path], precision: str, val: Batches, threads: int) -> dict[str, Any]:
    """Accuracy of all files on the held-out images, and how far the smaller one is from the pruned one there."""
    labels: list[NDArray[np.int64]] = []

    def images() -> Iterator[NDArray[np.float32]]:
        for batch, classes in val:
            labels.append(classes.numpy())
            yield batch.numpy()

    # One pass for all files: the next one may have another order.
    found = dict(zip(files, export.answers_of([*files.values()], images(), threads=threads), strict=True))
    truth = np.concatenate(labels)
    accuracy = {key: float(np.mean(logits.argmax(1) == truth)) for key, (logits, *_) in found.items()}
    kept = asdict(export.fidelity(found[precision], found["pruned"]))
    return {"accuracy": {**accuracy, "examples": len(truth)}, "fidelity": kept}
