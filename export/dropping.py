"""Branches that were closed: a layer with nothing but zeros for weights gives its bias, whatever it reads."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export.naming import TRANSPOSED

Array = npt.NDArray[Any]


LAYERS = ("Conv", "Gemm", "MatMul")


def drop_closed(model: ir.Model) -> int:
    """Put the constant that such a layer gives in its place, where it is added to something; how many there were.

    What computed the layer's input then has no reader and goes with all that nobody else needs.
    """
    return sum(_dropped(node) for node in list(model.graph) if node.op_type in LAYERS)


def ending_in_sums(path: str | Path) -> set[str]:
    """The weights of a file whose layers would be left out of it if they were zero, by their names in the network."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for node in ir.load(path).graph:
        if node.op_type in LAYERS and (weight := node.inputs[1]) is not None and _array(weight) is not None:
            found[_constant(node) is not None].add(str(weight.name).removesuffix(TRANSPOSED))
    return found[True] - found[False]  # a weight may serve several layers


def _dropped(node: ir.Node) -> bool:
    weight = _array(node.inputs[1])
    found = None if weight is None or weight.any() else _constant(node)
    if found is None:
        return False
    constant, output = found
    graph = node.graph
    assert graph is not None
    name = f"{output.name}_closed"
    settled = ir.Value(name=name, const_value=ir.tensor(constant, name=name))
    settled.shape, settled.dtype = ir.Shape(constant.shape), ir.DataType.from_numpy(constant.dtype)
    graph.register_initializer(settled)
    ir.convenience.replace_all_uses_with(output, settled)
    return True


def _constant(node: ir.Node) -> tuple[Array, ir.Value] | None:
    """What a layer of zeros adds to a sum of its shape, and the value that it would be; None without such a sum."""
    weight, output = _array(node.inputs[1]), node.outputs[0]
    assert weight is not None
    bias = _array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, weight.dtype)
    if bias is None or not _plain(node):
        return None
    constant = bias.reshape(-1, *[1] * (weight.ndim - 2)) if node.op_type == "Conv" else bias
    while (only := _only_addition(output)) and (other := _array(_other(only, output))) is not None:
        constant, output = constant + other, only.outputs[0]  # the bias of a linear layer is added behind its product
    if not only or _other(only, output).shape != output.shape or output.is_graph_output():
        return None
    return constant, output


def _plain(node: ir.Node) -> bool:
    """A Gemm may scale its bias; the exporter never asks for that."""
    return node.op_type != "Gemm" or all(node.attributes.get_float(key, 1.0) == 1.0 for key in ("alpha", "beta"))


def _only_addition(value: ir.Value) -> ir.Node | None:
    uses = [use.node for use in value.uses()]
    return uses[0] if len(uses) == 1 and uses[0].op_type == "Add" else None


def _other(addition: ir.Node, value: ir.Value) -> ir.Value:
    first, second = addition.inputs
    assert first is not None
    assert second is not None
    return second if first is value else first


def _array(value: ir.Value | None) -> Array | None:
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if constant is None else constant.numpy()
