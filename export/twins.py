"""A twin with a fixed batch, for compilers and mobile runtimes that take no free axis."""

from pathlib import Path

import onnx_ir as ir
import onnxscript.optimizer
from torch import nn

from export.capture import quiet, tidy_
from export.drafts import OnnxFile, require_writable, write_checked
from export.errors import BadOnnx, NotExportable, one_line
from export.parity import TOLERANCE
from export.preprocessing import Preprocessing
from export.provenance import parity_passed
from export.tensors import Examples, example_tuple, resting_copy


def static_twin(
    path: str | Path,
    output: str | Path,
    model: nn.Module,
    example_inputs: Examples,
    *,
    batch: int = 1,
    preprocessing: Preprocessing | None = None,
    tolerance: float = TOLERANCE,
) -> OnnxFile:
    """Write a twin of a file of `to_onnx` in which every axis has a size; it is compared with `model` at `batch`.

    With the batch known, what the graph computed from it, such as the target of a reshape, is folded into constants.
    Some runtimes take nothing else: CoreML delegates not one node of a ResNet with a free batch.

    Args:
        path: a file with a free batch. It stays as it is.
        output: where to; the folder must exist. A file that is already there is replaced only by a checked one.
        batch: the size of axis 0 in the twin.
        preprocessing: what `path` was written with.

    Raises:
        BadOnnx: `path` cannot be read.
        NotExportable: its batch is fixed already, or an axis depends on values and has no size even so.
        ParityFailed: as in `to_onnx`.
    """
    target, resting, examples = require_writable(output), resting_copy(model), example_tuple(example_inputs)
    if preprocessing is not None:
        resting, examples = preprocessing.before(resting, examples)
    if batch < 1:
        raise NotExportable(f"batch {batch} asked", at="batch", effect="nothing was written", fix="ask for 1 or more")
    graph = _read(Path(path))
    _fix_batch_(graph, batch, Path(path))
    graph.metadata_props["parity"] = parity_passed(tolerance, (batch,))
    names = [str(value.name) for value in graph.graph.inputs], [str(value.name) for value in graph.graph.outputs]
    return write_checked(graph, target, resting, examples, names=names, batch=batch, tolerance=tolerance)


def _read(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:
        raise BadOnnx(
            f"the file cannot be read: {one_line(error)}", at=str(path), effect="nothing was written",
            fix="give a file that to_onnx wrote",
        ) from error


def _fix_batch_(model: ir.Model, batch: int, path: Path) -> None:
    for value in model.graph.inputs:
        if not value.shape or isinstance(value.shape[0], int):
            raise NotExportable(
                f"input {value.name} of shape {value.shape} has no free batch", at=str(path),
                effect="nothing was written", fix="give a file that to_onnx wrote",
            )
        value.shape = ir.Shape([batch, *value.shape[1:]])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None  # the optimiser finds them anew, and believes those that are there
    with quiet():
        onnxscript.optimizer.optimize(model)
        tidy_(model)
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs if value.name)):
        if value.shape is None or not all(isinstance(size, int) for size in value.shape):
            raise NotExportable(
                f"the shape of {value.name}, {value.shape or 'unknown'}, cannot be inferred with batch {batch}",
                at=f"{path.name}, {producer.op_type if (producer := value.producer()) else 'graph input'}",
                effect="nothing was written; the file with a free batch is untouched",
                fix="ship that one: shapes that depend on values have no static twin",
            )
