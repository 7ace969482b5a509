"""`to_onnx`: one dense, checked, reproducible file, or an exception and no file."""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor, nn

from export.capture import capture
from export.errors import BadOnnx, NotExportable
from export.parity import BATCHES, TOLERANCE, Parity, parity_of
from export.provenance import provenance
from export.rules import check_rules
from export.tensors import Examples, example_tuple, outputs_of, repeat_to, resting_copy

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


def to_onnx(
    model: nn.Module,
    example_inputs: Examples,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    opset: int = 18,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    tolerance: float = TOLERANCE,
) -> OnnxFile:
    """Write `model` in eval mode as one ONNX file with a free batch size, after comparing it with the model.

    Opset 18 with the IR version that belongs to it (8) is read by the widest range of runtimes. The same model gives
    the same bytes. Networks over 2 GB get a second file, `<name>.data`, beside the first. The model is not modified.

    Args:
        example_inputs: a tensor, or a tuple with a tensor per argument of forward; axis 0 is the batch.
        path: where to; the folder must exist. A file that is already there is replaced only by a checked one.
        metadata: strings to put into the file, e.g. the recipe, the licence, what was kept.
        labels: the names of the classes, stored as a JSON list under "labels".
        opset: 18 or more. The exporter silently ignores smaller ones, so they are refused.
        input_names: default "input", or "input_0", "input_1", ...
        output_names: default "logits", or "output_0", "output_1", ... in the order of the nested output.
        tolerance: the largest allowed max |d| / max |reference|, see `check_parity`.

    Raises:
        NotExportable: the network, the examples or the options do not allow a dense, portable file.
        ParityFailed: the file does not compute what the network computes, or that could not be told.
    """
    examples = example_tuple(example_inputs)
    target = writable(path)
    ir_version = _ir_version(opset)
    resting = resting_copy(model)
    # At least two: with a batch of one, tracing could take "one" for a property of the network.
    traced = tuple(repeat_to(example, max(2, example.shape[0])) for example in examples)
    outputs = outputs_of(resting, traced)
    ins = _names("input", input_names, len(examples), "input")
    outs = _names("output", output_names, len(outputs), "logits")
    _check_distinct(ins, outs)
    _check_labels(labels, outputs)
    properties = provenance(metadata, labels, tolerance=tolerance, batches=BATCHES)

    graph = capture(resting, traced, opset=opset, input_names=ins, output_names=outs)
    graph.metadata_props.update(properties)
    graph.ir_version = ir_version
    # A folder of its own inside the target's: the same file system, so that the final move is atomic, and the final
    # names, so that the reference to a data file is already right.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        draft = Path(folder) / target.name
        files = _save(graph, draft)
        check_rules(draft, opset=opset, ir_version=ir_version, input_names=ins, output_names=outs)
        try:
            parity = parity_of(draft, resting, examples, tolerance=tolerance)
        except BadOnnx as error:
            raise NotExportable(
                "onnxruntime does not run what the exporter wrote", at=type(model).__name__,
                effect="nothing was written", fix="see the chained error; float32 is what onnxruntime covers best",
            ) from error
        sha256 = sha256_of(files)
        size = sum(file.stat().st_size for file in files)
        for file in reversed(files):  # the data first: the file that refers to it must never be without it
            os.replace(file, target.with_name(file.name))
    return OnnxFile(target, sha256, parity, opset, size)


def writable(path: str | Path) -> Path:
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise NotExportable(
            "this is a folder, not a file" if target.is_dir() else "the folder does not exist",
            at=str(target), effect="nothing was written", fix="name a file in a folder that exists",
        )
    return target


def _ir_version(opset: int) -> int:
    newest = onnx.defs.onnx_opset_version()
    if not 18 <= opset <= newest:
        raise NotExportable(
            f"opset {opset} asked; possible are 18 to {newest}", at="opset", effect="nothing was written",
            fix="use the default, 18: the exporter writes 18 whenever less is asked",
        )
    return int(onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]))


def _names(kind: str, given: Sequence[str] | None, count: int, single: str) -> tuple[str, ...]:
    if given is None:
        return (single,) if count == 1 else tuple(f"{kind}_{index}" for index in range(count))
    if isinstance(given, str) or len(given) != count:
        raise NotExportable(
            f"{kind}_names={given!r} does not name {count} {kind}{'s' * (count > 1)}", at=f"{kind}_names",
            effect="nothing was written", fix=f"pass a list of {count}",
        )
    return tuple(given)


def _check_distinct(ins: tuple[str, ...], outs: tuple[str, ...]) -> None:
    names = (*ins, *outs)
    if len(set(names)) != len(names) or "" in names:
        raise NotExportable(
            f"the names {list(names)} are not distinct", at="input_names and output_names",
            effect="nothing was written", fix="give every input and output a name of its own",
        )


def _check_labels(labels: Sequence[str] | None, outputs: tuple[Tensor, ...]) -> None:
    if labels is not None and outputs[0].dim() > 1 and len(labels) != outputs[0].shape[1]:
        raise NotExportable(
            f"{len(labels)} labels for {outputs[0].shape[1]} classes",
            at=f"labels and the first output, shape {tuple(outputs[0].shape)}",
            effect="nothing was written", fix="pass one label per class, in the order of the outputs",
        )


def _save(graph: ir.Model, draft: Path) -> tuple[Path, ...]:
    """Write the graph; the file, and the data file if the weights do not fit into the first."""
    weights = (value.const_value for part in graph.graphs() for value in part.initializers.values())
    if sum(weight.nbytes for weight in weights if weight is not None) < SINGLE_FILE_LIMIT:
        ir.save(graph, draft, format="protobuf")
        return (draft,)
    data = draft.with_name(draft.name + ".data")
    ir.save(graph, draft, format="protobuf", external_data=data.name)
    return (draft, data)


def sha256_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
