"""A saved network as ONNX files, with a card and a manifest beside them."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

import surgery
from diffprune.card import export_card
from diffprune.manifest import write_listing
from diffprune.pruned import Origin, require_same_bytes, write_files
from diffprune.runfolder import write_atomically
from export import OnnxFile, Preprocessing
from export.drafts import hidden, sha256_of

FORMAT = "diffprune-export-1"


@dataclass(frozen=True)
class Shipment:
    """What was written."""

    files: tuple[OnnxFile, ...]
    card: Path
    manifest: Path


def export_saved(
    saved: Path,
    output: Path,
    factory: Callable[[], nn.Module],
    origin: Origin,
    *,
    opset: int = 18,
    preprocessing: Preprocessing | None = None,
    twin: bool = False,
) -> Shipment:
    """Write the network in `saved` as `output`, and beside it STEM.card.md and STEM.manifest.json.

    All is written twice, from a network built anew each time: files that cannot be reproduced are not shipped.

    Args:
        factory: builds the dense network.
        preprocessing: what is baked into the files; they take uint8 pixels then.
        twin: write STEM-static.onnx, with a fixed batch of 1, too.

    Raises:
        surgery.BadFile: `saved` does not fit what `factory` builds.
        NotReproducible: other bytes the second time. What lay at `output` is left alone.
        NotExportable, ParityFailed: as `export.to_onnx`.
    """

    def written(folder: Path) -> tuple[OnnxFile, ...]:
        network = surgery.load(saved, factory)
        files = write_files(folder, network, {output.name: preprocessing}, origin, twins=twin, opset=opset)
        return tuple(files.values())

    with hidden(output) as folder, hidden(output) as other:
        files = written(folder)
        before, again = ({file.path.name: file.sha256 for file in several} for several in (files, written(other)))
        require_same_bytes(again, before, source=saved.name)
        card, manifest = (f"{output.stem}.{ending}" for ending in ("card.md", "manifest.json"))
        text = export_card(files, origin, saved.name, manifest, baked=preprocessing is not None)
        write_atomically(folder / card, text)
        body = {
            "format": FORMAT, "saved": {"name": saved.name, "sha256": sha256_of(saved)}, "opset": opset,
            "metadata": dict(origin.metadata), "labels": origin.labels,
        }  # fmt: skip
        write_listing(folder / manifest, body, sorted(folder.iterdir()))
        for path in sorted(folder.iterdir(), reverse=True):  # data files before those that refer to them
            os.replace(path, output.with_name(path.name))
    shipped = tuple(replace(file, path=output.with_name(file.path.name)) for file in files)
    return Shipment(shipped, output.with_name(card), output.with_name(manifest))
