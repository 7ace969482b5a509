"""The latency of single layers at several widths, measured on the target runtime and remembered."""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.errors import BadOnnx
from export.machine import cpu_kind, this_machine
from export.profiling import RUNS as PROFILED
from export.profiling import NodeTime, profile
from export.sessions import read_model

Widths = tuple[int, int]
"""Channels in and out of a layer."""

PORTION = 1 << 28
"""Bytes of weights measured side by side: an ONNX file holds less than 2 GB, and VGG's first linear layer at all the
widths of its table is 8."""

HALF_A_TICK = 5e-4
"""Milliseconds of what the profile's clock, which counts microseconds, does not see."""

RUNS = 12
"""Of which the fastest counts: other work on the machine only adds. How well it repeats was not measured by itself."""


@dataclass(frozen=True)
class LayerKind:
    """A layer but for its widths: `positions` is the input without batch and channels, `groups` 0 if depthwise.

    Of a matrix product `positions` is the number of rows, those of the whole batch. `attributes` are ONNX's: strides,
    pads, dilations and the like.
    """

    op: str
    kernel: tuple[int, ...]
    attributes: tuple[tuple[str, tuple[int, ...]], ...]
    groups: int
    positions: tuple[int, ...]

    def entry(self, widths: Widths) -> str:
        """The name of a measurement."""
        details = "".join(f" {name}={'x'.join(map(str, values))}" for name, values in self.attributes)
        at = "x".join(map(str, self.positions)) or "1"
        kernel = "x".join(map(str, self.kernel)) or "1"
        return f"{self.op} {kernel} groups={self.groups or 'depthwise'} on {at}{details}: {widths[0]} to {widths[1]}"


@dataclass(frozen=True)
class TimedLayer:
    """A layer of a file: its kind, its widths, the initializer that holds its weight, its milliseconds in the file."""

    kind: LayerKind
    widths: Widths
    weight: str
    output: tuple[int, ...]
    ms: float

    @property
    def macs(self) -> int:
        """Multiply-adds of one run: each weight once at every place that is written (ConvTranspose: read)."""
        places = self.output[2:] if self.kind.op == "Conv" else self.kind.positions
        return self._batch * math.prod(places) * self._weights

    @property
    def bytes(self) -> int:
        """What one run must at least read and write, in float32: input, weight and output."""
        read = self._batch * self.widths[0] * math.prod(self.kind.positions)
        return 4 * (read + self._weights + math.prod(self.output))

    @property
    def _batch(self) -> int:
        return 1 if self.kind.op == "MatMul" else self.output[0]  # whose positions count the whole batch

    @property
    def _weights(self) -> int:
        return math.prod(_weight_shape(self.kind, self.widths))


def layers_of(
    path: str | Path, *, threads: int = 1, batch: int = 1, runs: int = PROFILED
) -> tuple[list[TimedLayer], list[NodeTime]]:
    """The layers of a file with a weight, and the rest of its nodes, in the order they run: its `profile`, read."""
    graph = read_model(path).graph
    nodes = {node.name: node for node in graph.node}
    shapes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    layers, rest = [], []
    for time in profile(path, threads=threads, batch=batch, runs=runs):
        if time.layer is None:
            rest.append(time)
            continue
        node = nodes[time.layer]
        kind, widths = _kind(node, shapes[node.input[1]], time)
        # Of a convolution the runtime reports channels padded to its blocks.
        output = time.output if kind.op == "MatMul" else (time.output[0], widths[1], *time.output[2:])
        layers.append(TimedLayer(kind, widths, node.input[1], output, max(time.ms, HALF_A_TICK)))
    return layers, rest


def _kind(node: onnx.NodeProto, weight: tuple[int, ...], time: NodeTime) -> tuple[LayerKind, Widths]:
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in ("Gemm", "MatMul"):
        flipped = bool(given.get("transB", 0))
        widths = (weight[1], weight[0]) if flipped else (weight[0], weight[1])
        return LayerKind("MatMul", (), (), 1, (math.prod(time.output[:-1]),)), widths
    kept = ("strides", "pads", "dilations", "output_padding")
    attributes = tuple((name, tuple(given[name])) for name in kept if name in given)
    groups = int(given.get("group", 1))
    depthwise = groups > 1 and weight[1] == 1 and weight[0] == groups
    inside, outside = (weight[1] * groups, weight[0]) if node.op_type == "Conv" else (weight[0], weight[1] * groups)
    kind = LayerKind(node.op_type, weight[2:], attributes, 0 if depthwise else groups, time.inputs[0][2:])
    return kind, (inside, outside)


def layer_table(
    wanted: Mapping[LayerKind, Sequence[Widths]],
    *,
    threads: int = 1,
    batch: int = 1,
    folder: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[tuple[LayerKind, Widths], float]:
    """Milliseconds of each layer wanted, the fastest of RUNS.

    All widths of a kind are measured side by side in one file, by onnxruntime's profiler: only the layer itself counts,
    not the change of layout before and after it, which neighbours in a network do not have. What was measured before on
    this CPU with this onnxruntime, `threads` and `batch` is read from `folder`, by default `cache_folder()`, where it
    is added kind by kind: a table that was interrupted goes on.
    """
    file = (folder or cache_folder()) / f"layers-{_target(threads, batch)}.json"
    known = _read(file)
    for done, (kind, pairs) in enumerate(wanted.items()):
        on_progress(done, len(wanted))
        missing = [widths for widths in dict.fromkeys(pairs) if kind.entry(widths) not in known]
        for portion in _portions(kind, missing):
            known |= _measured(kind, portion, threads, batch)
            _write(file, _read(file) | known)
    on_progress(len(wanted), len(wanted))
    return {(kind, widths): known[kind.entry(widths)] for kind, pairs in wanted.items() for widths in pairs}


def cache_folder() -> Path:
    """Where measurements are remembered: $XDG_CACHE_HOME/diffprune, or ~/.cache/diffprune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffprune"


def _target(threads: int, batch: int) -> str:
    """Names what a measurement holds for: CPU, runtime, threads, batch, precision."""
    machine = this_machine()
    kind = machine.cpu, *cpu_kind(), machine.isa, machine.onnxruntime
    text = json.dumps([*kind, threads, batch, "fp32", RUNS])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, float]:
    """What is remembered; nothing if the file is not there or is no longer whole."""
    try:
        return {str(entry): float(ms) for entry, ms in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(file: Path, known: Mapping[str, float]) -> None:
    """Remember what can be remembered: without a folder to write into, a measurement counts all the same."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(known, indent=0))
        draft.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _portions(kind: LayerKind, pairs: Sequence[Widths]) -> Iterator[list[Widths]]:
    """`pairs`, in order, as many at once as weigh less than PORTION, at least one."""
    portion, weight = list[Widths](), 0
    for widths in pairs:
        own = 4 * math.prod(_weight_shape(kind, widths))
        if portion and weight + own > PORTION:
            yield portion
            portion, weight = [], 0
        portion, weight = [*portion, widths], weight + own
    if portion:
        yield portion


def _measured(kind: LayerKind, pairs: Sequence[Widths], threads: int, batch: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers.onnx"
        onnx.save(side_by_side(kind, pairs, batch), str(path))
        times = {time.layer: time.ms for time in profile(path, threads=threads, batch=batch, runs=RUNS)}
    missing = [widths for widths in pairs if _name(widths) not in times]
    if missing:
        raise BadOnnx(
            f"onnxruntime's profile does not show {kind.entry(missing[0])}", at="a file of single layers",
            effect="the latency of layers is not known", fix="please report this with your version of onnxruntime",
        )
    return {kind.entry(widths): max(times[_name(widths)], HALF_A_TICK) for widths in pairs}


def side_by_side(kind: LayerKind, pairs: Sequence[Widths], batch: int) -> onnx.ModelProto:
    """One file with a layer for each of `pairs`; those of the same width read the same input."""
    generator = np.random.default_rng(0)
    nodes, weights, outputs = [], [], []
    for widths in pairs:
        name = _name(widths)
        shape = _weight_shape(kind, widths)
        values = generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
        weights.append(numpy_helper.from_array(values, f"weight_{name}"))
        attributes: dict[str, Any] = {key: list(entry) for key, entry in kind.attributes}
        if kind.op != "MatMul":
            attributes["group"] = kind.groups or widths[0]
        product = f"product_{name}"
        nodes.append(helper.make_node(kind.op, [f"x_{widths[0]}", f"weight_{name}"], [product], name, **attributes))
        nodes.append(helper.make_node("Relu", [product], [f"y_{name}"]))  # fused, as it mostly is in networks
        outputs.append(helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT, None))
    inputs = [
        helper.make_tensor_value_info(f"x_{width}", TensorProto.FLOAT, _input_shape(kind, width, batch))
        for width in dict.fromkeys(widths[0] for widths in pairs)
    ]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def _weight_shape(kind: LayerKind, widths: Widths) -> tuple[int, ...]:
    inside, outside = widths
    if kind.op == "MatMul":
        return widths
    groups = kind.groups or inside
    return (*((outside, inside // groups) if kind.op == "Conv" else (inside, outside // groups)), *kind.kernel)


def _input_shape(kind: LayerKind, width: int, batch: int) -> tuple[int, ...]:
    return (batch, kind.positions[0] // batch, width) if kind.op == "MatMul" else (batch, width, *kind.positions)


def _name(widths: Widths) -> str:
    return f"{widths[0]}_{widths[1]}"


