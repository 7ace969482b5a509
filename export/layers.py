"""The layers of an ONNX file, and single layers in files of their own, by onnxruntime's profile."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.errors import BadOnnx
from export.layer_kinds import LayerKind, TimedLayer, Widths, weight_shape
from export.naming import TRANSPOSED
from export.profiling import RUNS as PROFILED
from export.profiling import NodeTime, named, profile
from export.settings import Settings

PORTION = 1 << 28
"""Bytes of weights measured side by side: an ONNX file holds less than 2 GB, and VGG's first linear layer at all the
widths of its table is 8."""

HALF_A_TICK = 5e-4
"""Milliseconds of what the profile's clock, which counts microseconds, does not see."""

RUNS = 12
"""Of which the fastest counts: other work on the machine only adds. How well it repeats was not measured by itself."""


def layers_of(
    path: str | Path, *, threads: int = 1, batch: int = 1, runs: int = PROFILED
) -> tuple[list[TimedLayer], list[NodeTime]]:
    """The layers of a file with a weight, and the rest of its nodes, in the order they run: its `profile`, read.

    Weights have the names that they have in the network, if `to_onnx` wrote the file.
    """
    graph = named(path)[0].graph
    nodes = {node.name: node for node in graph.node}
    shapes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    layers, rest = [], []
    for time in profile(path, threads=threads, batch=batch, runs=runs):
        if time.layer is None:
            rest.append(time)
            continue
        node = nodes[time.layer]
        name, flipped = node.input[1], _flipped(node)
        kind, widths = _kind(node, shapes[name], time)
        # Of a convolution the runtime reports channels padded to its blocks.
        output = time.output if kind.op == "MatMul" else (time.output[0], widths[1], *time.output[2:])
        raw = kind.op == "MatMul" and not flipped and not name.endswith(TRANSPOSED)
        layers.append(TimedLayer(kind, widths, name.removesuffix(TRANSPOSED), output, max(time.ms, HALF_A_TICK), raw))
    return layers, rest


def _kind(node: onnx.NodeProto, weight: tuple[int, ...], time: NodeTime) -> tuple[LayerKind, Widths]:
    if node.op_type in ("Gemm", "MatMul"):
        widths = (weight[1], weight[0]) if _flipped(node) else (weight[0], weight[1])
        return LayerKind("MatMul", (), (), 1, (math.prod(time.output[:-1]),)), widths
    given = _attributes(node)
    kept = ("strides", "pads", "dilations", "output_padding")
    attributes = tuple((name, tuple(given[name])) for name in kept if name in given)
    groups = int(given.get("group", 1))
    depthwise = groups > 1 and weight[1] == 1 and weight[0] == groups
    inside, outside = (weight[1] * groups, weight[0]) if node.op_type == "Conv" else (weight[0], weight[1] * groups)
    kind = LayerKind(node.op_type, weight[2:], attributes, 0 if depthwise else groups, time.inputs[0][2:])
    return kind, (inside, outside)


def _flipped(node: onnx.NodeProto) -> bool:
    return bool(_attributes(node).get("transB", 0))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def in_files(kind: LayerKind, pairs: Sequence[Widths], settings: Settings) -> Iterator[dict[Widths, float]]:
    """Milliseconds of a layer of a kind at `pairs` of widths, the fastest of RUNS, portion by portion.

    All of a portion are measured side by side in one file, by onnxruntime's profiler: only the layer itself counts, not
    the change of layout before and after it, which neighbours in a network do not have.
    """
    for portion in _portions(kind, pairs):
        yield _measured(kind, portion, settings.threads, settings.batch)


def _portions(kind: LayerKind, pairs: Sequence[Widths]) -> Iterator[list[Widths]]:
    """`pairs`, in order, as many at once as weigh less than PORTION, at least one."""
    portion, weight = list[Widths](), 0
    for widths in pairs:
        own = 4 * math.prod(weight_shape(kind, widths))
        if portion and weight + own > PORTION:
            yield portion
            portion, weight = [], 0
        portion, weight = [*portion, widths], weight + own
    if portion:
        yield portion


def _measured(kind: LayerKind, pairs: Sequence[Widths], threads: int, batch: int) -> dict[Widths, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers.onnx"
        onnx.save(side_by_side(kind, pairs, batch), str(path))
        first = _input_shape(kind, 1, batch)[0]
        times = {time.layer: time.ms for time in profile(path, threads=threads, batch=first, runs=RUNS)}
    missing = [widths for widths in pairs if _name(widths) not in times]
    if missing:
        raise BadOnnx(
            f"onnxruntime's profile does not show {kind.entry(missing[0])}", at="a file of single layers",
            effect="the latency of layers is not known", fix="please report this with your version of onnxruntime",
        )
    return {widths: max(times[_name(widths)], HALF_A_TICK) for widths in pairs}


def side_by_side(kind: LayerKind, pairs: Sequence[Widths], batch: int) -> onnx.ModelProto:
    """One file with a layer for each of `pairs`; those of the same width read the same input."""
    generator = np.random.default_rng(0)
    nodes, weights, outputs = [], [], []
    for widths in pairs:
        name = _name(widths)
        shape = weight_shape(kind, widths)
        values = generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
        weights.append(numpy_helper.from_array(values, f"weight_{name}"))
        attributes: dict[str, Any] = {key: list(entry) for key, entry in kind.attributes}
        if kind.op != "MatMul":
            attributes["group"] = kind.groups or widths[0]
        product = f"product_{name}"
        nodes.append(helper.make_node(kind.op, [f"x_{widths[0]}", f"weight_{name}"], [product], name, **attributes))
        nodes.append(helper.make_node("Relu", [product], [f"y_{name}"], f"relu_{name}"))  # fused, as mostly in networks
        outputs.append(helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT, None))
    inputs = [
        helper.make_tensor_value_info(f"x_{width}", TensorProto.FLOAT, _input_shape(kind, width, batch))
        for width in dict.fromkeys(widths[0] for widths in pairs)
    ]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def _input_shape(kind: LayerKind, width: int, batch: int) -> tuple[int, ...]:
    return (kind.positions[0], width) if kind.op == "MatMul" else (batch, width, *kind.positions)


def _name(widths: Widths) -> str:
    return f"{widths[0]}_{widths[1]}"
