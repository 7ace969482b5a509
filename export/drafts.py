"""From a graph in memory to a checked file: what fails a check never gets the name that was asked for."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from export.errors import BadOnnx, NotExportable
from export.parity import Parity, parity_of
from export.rules import check_rules

# Protobuf ends at 2 GiB; 16 MiB are left for the graph itself.
SINGLE_FILE_LIMIT = 2**31 - 2**24


@dataclass(frozen=True)
class OnnxFile:
    """A file that was written and checked. `sha256` and `size` (bytes) include the data file beside it, if any."""

    path: Path
    sha256: str
    parity: Parity
    opset: int
    size: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the file by its name, without its folder."""
        return {"file": self.path.name, "sha256": self.sha256, "opset": self.opset, "size": self.size,
                "parity": self.parity.as_dict()}


def require_writable(path: str | Path) -> Path:
    """Raises NotExportable for what is no file in a folder that exists."""
    target = Path(path)
    if os.path.isdir(target) or not os.path.isdir(target.parent):
        raise NotExportable(
            "this is a folder, not a file" if os.path.isdir(target) else "the folder does not exist",
            at=str(target), effect="nothing was written", fix="name a file in a folder that exists",
        )
    return target


def write_checked(
    graph: ir.Model,
    target: Path,
    resting: nn.Module,
    examples: tuple[Tensor, ...],
    *,
    names: tuple[Sequence[str], Sequence[str]],
    batch: str | int = "batch",
    tolerance: float,
) -> OnnxFile:
    """Write `graph`, hold it to the rules and compare it with the network; only then does it become `target`.

    Args:
        names: those of the inputs and those of the outputs that the file must have.
        batch: the name of the free batch axis, or the size of a fixed one.

    Raises:
        NotExportable, ParityFailed: see `to_onnx`.
    """
    opset = graph.graph.opset_imports[""]
    with hidden(target) as folder:
        draft = folder / target.name  # the final name, so that the reference to a data file is already right
        files = save(graph, draft)
        check_rules(
            draft, opset=opset, ir_version=graph.ir_version, input_names=names[0], output_names=names[1], batch=batch
        )
        try:
            parity = parity_of(draft, resting, examples, tolerance=tolerance)
        except BadOnnx as error:
            raise NotExportable(
                "onnxruntime does not run what the exporter wrote", at=type(resting).__name__,
                effect="nothing was written", fix="see the chained error; float32 is what onnxruntime covers best",
            ) from error
        sha256 = sha256_of(*files)
        size = sum(file.stat().st_size for file in files)
        for file in reversed(files):  # the data first: the file that refers to it must never be without it
            os.replace(file, target.with_name(file.name))
    return OnnxFile(target, sha256, parity, opset, size)


@contextmanager
def hidden(place: Path) -> Iterator[Path]:
    """A folder for drafts beside the file to be: on the same file system, so that the final move is atomic."""
    try:
        drafts = tempfile.TemporaryDirectory(dir=place.parent, prefix=".export-")
    except OSError as error:
        raise NotExportable(
            f"nothing can be written there: {error.strerror}", at=place.name, effect="nothing was written",
            fix="name a file in a folder that you may write into",
        ) from error
    with drafts as folder:
        yield Path(folder)


def save(graph: ir.Model, draft: Path) -> tuple[Path, ...]:
    """Write the graph; the file, and the data file if the weights do not fit into the first."""
    weights = (value.const_value for part in graph.graphs() for value in part.initializers.values())
    if sum(weight.nbytes for weight in weights if weight is not None) < SINGLE_FILE_LIMIT:
        ir.save(graph, draft, format="protobuf")
        return (draft,)
    data = draft.with_name(draft.name + ".data")
    ir.save(graph, draft, format="protobuf", external_data=data.name)
    return (draft, data)


def sha256_of(*files: Path) -> str:
    """Of their bytes, one file after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
