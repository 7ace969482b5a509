"""Constant factors behind a convolution: a closed gate is refused, any other factor goes into the weights."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export.errors import NotExportable

Array = npt.NDArray[np.generic]

# What may stand between a layer and its gate: operators that treat every channel by itself.
ELEMENTWISE = {
    "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh",
    "Softplus", "Mish", "PRelu", "Identity", "BatchNormalization",
}


def fold_scales(model: ir.Model) -> int:
    """Multiply factors directly behind a Conv into its weight and bias, in place; the number of factors folded.

    (W * x + b) f = (f W) * x + f b for one constant f per output channel. Neither the exporter nor its optimiser does
    this, and a factor left standing also keeps the BatchNorm behind it from being folded.

    Raises:
        NotExportable: a factor is exactly zero, so a closed channel is computed and thrown away.
    """
    refuse_closed_gates(model)
    return sum(_fold(node) for node in list(model.graph) if node.op_type == "Mul")


def refuse_closed_gates(model: ir.Model) -> None:
    """Raise NotExportable if a layer's channels are multiplied with a constant that has exact zeros."""
    for node in model.graph:
        if node.op_type != "Mul":
            continue
        value, factor = _value_and_factor(node)
        if value is None or factor is None or not (closed := int((factor == 0).sum())):
            continue
        layer = value.producer()
        while layer is not None and layer.op_type in ELEMENTWISE and layer.inputs[0] is not None:
            layer = layer.inputs[0].producer()
        if layer is not None and _scales_channels(layer, factor):
            raise NotExportable(
                f"a gate is left in the network: {closed} of {factor.size} channels are multiplied with zero",
                at=f"the output of {layer.op_type} with weight {_weight_name(layer)}",
                effect="nothing was written; closed channels would be computed and thrown away",
                fix="cut the closed channels out of the network, then export the cut network",
            )


def _fold(mul: ir.Node) -> bool:
    value, factor = _value_and_factor(mul)
    conv = value.producer() if value is not None else None
    if value is None or factor is None or conv is None or conv.op_type != "Conv" or not _scales_channels(conv, factor):
        return False
    parameters = [parameter for parameter in conv.inputs[1:] if parameter is not None]
    alone = len(value.uses()) == 1 and not value.is_graph_output() and all(len(p.uses()) == 1 for p in parameters)
    if not alone or any(p.const_value is None for p in parameters):
        return False  # a shared weight has other readers, to whom the factor does not apply
    for parameter in parameters:
        assert parameter.const_value is not None
        old = parameter.const_value.numpy()
        per_channel = factor.reshape(-1, *[1] * (old.ndim - 1))
        parameter.const_value = ir.tensor((old * per_channel).astype(old.dtype), name=parameter.name)
    result = mul.outputs[0]
    name = result.name
    graph = mul.graph
    assert graph is not None
    ir.convenience.replace_all_uses_with(result, value, replace_graph_outputs=True)
    graph.remove(mul, safe=True)
    value.name = name
    return True


def _value_and_factor(mul: ir.Node) -> tuple[ir.Value | None, Array | None]:
    """The computed and the constant input of a multiplication, None where there is none."""
    for value, other in (mul.inputs, tuple(reversed(mul.inputs))):
        constant = ir.convenience.get_const_tensor(other) if other is not None else None
        if constant is not None:
            return value, constant.numpy()
    return None, None


def _scales_channels(layer: ir.Node, factor: Array) -> bool:
    """Whether `factor` is one number, or one per output channel of a Conv (axis 1) or a linear layer (last axis)."""
    if layer.op_type not in {"Conv", "Gemm", "MatMul"}:
        return False
    if factor.size == 1:
        return True
    weight = layer.inputs[1]
    if weight is None or weight.shape is None or layer.outputs[0].shape is None:
        return False
    if layer.op_type == "Conv":
        rank = len(layer.outputs[0].shape)
        spread = (1,) * (rank - factor.ndim) + factor.shape
        return len(spread) == rank and bool(spread[1] == factor.size == weight.shape[0])
    return bool(factor.shape[-1] == factor.size == layer.outputs[0].shape[-1])


def _weight_name(layer: ir.Node) -> str:
    weight = layer.inputs[1]
    return str(weight.name) if weight is not None else "unknown"
