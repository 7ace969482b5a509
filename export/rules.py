"""The laws that a written ONNX file obeys; whatever breaks one is not handed out."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import onnx

from export.errors import NotExportable


def check_rules(
    path: Path,
    *,
    opset: int,
    ir_version: int,
    input_names: Sequence[str],
    output_names: Sequence[str],
    batch: str | int = "batch",
) -> None:
    """Read the file back and hold it to every law: valid, portable, dense. `batch`: the free axis, or a fixed size.

    Raises:
        NotExportable: the first law that is broken, with the node that breaks it.
    """
    model = check_portable(path, opset=opset, ir_version=ir_version)
    _check_names("input", [value.name for value in model.graph.input], input_names)
    _check_names("output", [value.name for value in model.graph.output], output_names)
    for value in model.graph.input:
        first = value.type.tensor_type.shape.dim[0]
        if (first.dim_param or first.dim_value) != batch:
            _refuse(
                f"the batch of input {value.name} is {first.dim_param or first.dim_value}, not "
                f"{'free' if batch == 'batch' else batch}", at="graph inputs",
                fix="do not fix the batch size in forward(), e.g. write x.flatten(1) instead of x.view(2, -1)",
            )
    _check_dense(model.graph)


def check_portable(path: Path, *, opset: int, ir_version: int) -> onnx.ModelProto:
    """Read the file back, without weights beside it, and hold it to the laws of any file: valid, standard operators.

    Raises:
        NotExportable: the first law that is broken, with the node that breaks it.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        _refuse(f"the written file is not valid ONNX: {error}", at=path.name, cause=error)
    model = onnx.load(str(path), format="protobuf", load_external_data=False)
    _check_versions(model, opset, ir_version)
    return model


def _check_versions(model: onnx.ModelProto, opset: int, ir_version: int) -> None:
    found = {entry.domain: entry.version for entry in model.opset_import}
    if found != {"": opset}:
        _refuse(f"the file uses the operator sets {found}, asked was opset {opset} of the standard domain only",
                at="opset_import")
    if model.ir_version != ir_version:
        _refuse(f"the file has IR version {model.ir_version}, wanted was {ir_version}", at="ir_version")
    if model.functions:
        _refuse(f"{len(model.functions)} local functions are left", at=f"function {model.functions[0].name}")
    foreign = [node for node in model.graph.node if node.domain not in ("", "ai.onnx")]
    if foreign:
        _refuse(f"operator {foreign[0].domain}.{foreign[0].op_type} is not standard ONNX", at=f"node {foreign[0].name}")


def _check_names(kind: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    if list(found) != list(wanted):
        _refuse(
            f"the file has the {kind}s {list(found)}, wanted were {list(wanted)}", at=f"graph {kind}s",
            fix=f"return every tensor once and let forward() use each of its inputs, then name {len(found)} {kind}s",
        )


def _check_dense(graph: onnx.GraphProto) -> None:
    """No BatchNormalization that belongs into a Conv, and no constant factor that does.

    A Conv whose weight or whose output has other readers cannot take either: those files are as dense as they can be.
    """
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    convolutions = {
        node.output[0]: node for node in graph.node
        if node.op_type == "Conv" and readers[node.output[0]] == 1
        and all(name in constants and readers[name] == 1 for name in node.input[1:] if name)
    }
    for node in graph.node:
        for value in node.input:
            conv = convolutions.get(value)
            if conv is None:
                continue
            others = [name for name in node.input if name != value]
            if not others or not all(name in constants for name in others):
                continue
            if node.op_type == "BatchNormalization":
                _refuse("a BatchNormalization is left directly behind a Conv", at=f"weight {conv.input[1]}")
            if node.op_type == "Mul" and _per_channel(constants[others[0]], constants[conv.input[1]]):
                _refuse("a constant factor is left directly behind a Conv, as a forgotten gate would be",
                        at=f"weight {conv.input[1]}", fix="multiply the factor into the weights, or cut")


def _per_channel(factor: list[int], weight: list[int]) -> bool:
    """Whether a constant of shape `factor` scales the output channels of a Conv with `weight` (out, in, *kernel)."""
    shape = [1] * (len(weight) - len(factor)) + factor
    return all(size == (weight[0] if axis == 1 else 1) for axis, size in enumerate(shape))


def _refuse(fact: str, *, at: str, fix: str = "please report this network", cause: Exception | None = None) -> NoReturn:
    raise NotExportable(fact, at=at, effect="nothing was written; an older file is untouched", fix=fix) from cause
