"""`to_onnx`: one dense, checked, reproducible file, or an exception and no file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from torch import Tensor, nn

from export.capture import capture
from export.drafts import OnnxFile, require_writable, save, write_checked
from export.errors import NotExportable
from export.parity import BATCHES, TOLERANCE
from export.preprocessing import Preprocessing
from export.provenance import provenance
from export.tensors import Examples, example_tuple, outputs_of, repeat_to, resting_copy

Names = tuple[str, ...]


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
    preprocessing: Preprocessing | None = None,
    tolerance: float = TOLERANCE,
) -> OnnxFile:
    """Write `model` in eval mode as one ONNX file with a free batch size, after comparing it with the model.

    Opset 18 with the IR version that belongs to it (8) is read by the widest range of runtimes. The same model gives
    the same bytes. A branch that ends in weights of exact zeros is not in the file, only the constant that it adds.
    Networks over 2 GB get a second file, `<name>.data`, beside the first. The model is not modified.

    Args:
        example_inputs: a tensor, or a tuple with a tensor per argument of forward; axis 0 is the batch.
        path: where to; the folder must exist. A file that is already there is replaced only by a checked one.
        metadata: strings to put into the file, e.g. the recipe, the licence, what was kept.
        labels: the names of the classes, stored as a JSON list under "labels".
        opset: 18 or more. The exporter silently ignores smaller ones, so they are refused.
        input_names: default "input", or "input_0", "input_1", ...
        output_names: default "logits", or "output_0", "output_1", ... in the order of the nested output.
        preprocessing: makes the file take uint8 pixels (batch, H, W, C) and normalise them itself; `example_inputs`
            stay what the network takes. Without it the file takes what the network takes.
        tolerance: the largest allowed max |d| / max |reference|, see `check_parity`.

    Raises:
        NotExportable: the network, the examples or the options do not allow a dense, portable file.
        ParityFailed: the file does not compute what the network computes, or that could not be told.
    """
    examples = example_tuple(example_inputs)
    target = require_writable(path)
    resting = resting_copy(model)
    if preprocessing is not None:
        resting, examples = preprocessing.before(resting, examples)
    baked = {} if preprocessing is None else preprocessing.metadata()
    properties = provenance(metadata, labels, tolerance=tolerance, batches=BATCHES, baked=baked)
    graph, names = _graph(resting, examples, opset, input_names, output_names, labels)
    graph.metadata_props.update(properties)
    return write_checked(graph, target, resting, examples, names=names, tolerance=tolerance)


def for_timing(model: nn.Module, example_inputs: Examples, path: str | Path) -> Path:
    """Write `model` as `to_onnx` does, but compare nothing: for measuring only, which no value matters to.

    Networks on the way, cut and not yet trained again, may answer with constants, and no comparison would prove
    anything. Raises NotExportable.
    """
    target = require_writable(path)
    graph, _ = _graph(resting_copy(model), example_tuple(example_inputs))
    save(graph, target)
    return target


def _graph(
    resting: nn.Module,
    examples: tuple[Tensor, ...],
    opset: int = 18,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
) -> tuple[ir.Model, tuple[Names, Names]]:
    """The network as a graph, and the names of its inputs and outputs."""
    ir_version = _ir_version(opset)
    # At least two: with a batch of one, tracing could take "one" for a property of the network.
    traced = tuple(repeat_to(example, max(2, example.shape[0])) for example in examples)
    outputs = outputs_of(resting, traced)
    ins = _names("input", input_names, len(examples), "input")
    outs = _names("output", output_names, len(outputs), "logits")
    _check_distinct(ins, outs)
    _check_free((*ins, *outs), resting)
    _check_labels(labels, outputs)
    graph = capture(resting, traced, opset=opset, input_names=ins, output_names=outs)
    graph.ir_version = ir_version
    return graph, (ins, outs)


def _ir_version(opset: int) -> int:
    newest = onnx.defs.onnx_opset_version()
    if not 18 <= opset <= newest:
        raise NotExportable(
            f"opset {opset} asked; possible are 18 to {newest}", at="opset", effect="nothing was written",
            fix="use the default, 18: the exporter writes 18 whenever less is asked",
        )
    return int(onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]))


def _names(kind: str, given: Sequence[str] | None, count: int, single: str) -> Names:
    if given is None:
        return (single,) if count == 1 else tuple(f"{kind}_{index}" for index in range(count))
    if isinstance(given, str) or len(given) != count:
        raise NotExportable(
            f"{kind}_names={given!r} does not name {count} {kind}{'s' * (count > 1)}", at=f"{kind}_names",
            effect="nothing was written", fix=f"pass a list of {count}",
        )
    return tuple(given)


def _check_distinct(ins: Names, outs: Names) -> None:
    names = (*ins, *outs)
    if len(set(names)) != len(names) or "" in names:
        raise NotExportable(
            f"the names {list(names)} are not distinct", at="input_names and output_names",
            effect="nothing was written", fix="give every input and output a name of its own",
        )


def _check_free(names: Names, resting: nn.Module) -> None:
    weights = {name for name, _ in (*resting.named_parameters(), *resting.named_buffers())}
    for name in names:
        if name in weights:
            raise NotExportable(
                f"{name!r} is the name of a weight, and would be that of an input or output", at=type(resting).__name__,
                effect="nothing was written", fix="give other names with input_names and output_names",
            )


def _check_labels(labels: Sequence[str] | None, outputs: tuple[Tensor, ...]) -> None:
    if labels is not None and outputs[0].dim() > 1 and len(labels) != outputs[0].shape[1]:
        raise NotExportable(
            f"{len(labels)} labels for {outputs[0].shape[1]} classes",
            at=f"labels and the first output, shape {tuple(outputs[0].shape)}",
            effect="nothing was written", fix="pass one label per class, in the order of the outputs",
        )
