"""Where the time of an ONNX file goes, node by node, as onnxruntime's own profiler sees it."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.errors import BadOnnx
from export.feeds import input_specs, random_feed, runner, tried
from export.sessions import data_files, open_session, read_model

MULTIPLY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that the weight of a layer is given to."""

ABSORBED = ("Relu", "Clip", "Add", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh", "HardSwish")
"""Operators that onnxruntime computes together with the convolution before them."""

BLOCK = 16
"""The largest block of channels that onnxruntime computes convolutions in."""

RUNS = 20
WARM_UP = 3


@dataclass(frozen=True)
class NodeTime:
    """Milliseconds of one node as it runs, after fusion, in the fastest run. `inputs` and `output` are shapes.

    `layer` is the node of the file that multiplies by an initializer, by its name; None elsewhere.
    """

    name: str
    op: str
    ms: float
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    layer: str | None


def profile(path: str | Path, *, threads: int = 1, batch: int = 1, runs: int = RUNS) -> tuple[NodeTime, ...]:
    """The nodes of a file in the order they run, each with its time on random inputs.

    The fastest of `runs` runs: other work on the machine only adds. Profiling itself takes some percent and the clock
    counts whole microseconds, so this is good for shares, not for claims. Raises what `measure` raises.
    """
    model, changed = named(path)
    with _where(Path(path), model, changed) as file:
        events = _events(file, threads, batch, runs + WARM_UP)
    if not events:
        return ()
    per_run = len(events) // (runs + WARM_UP)
    times = np.array([e["dur"] for e in events], dtype=float).reshape(-1, per_run)[WARM_UP:].min(axis=0) / 1000
    layers = _Layers(model.graph)
    found = []
    for event, ms in zip(events[:per_run], times, strict=True):
        name, args = event["name"].removesuffix("_kernel_time"), event["args"]
        inputs, outputs = (tuple(map(_shape, args[key])) for key in ("input_type_shape", "output_type_shape"))
        layer = layers.find(name, args["op_name"], inputs)
        found.append(NodeTime(name, args["op_name"], float(ms), inputs, outputs[0] if outputs else (), layer))
    return tuple(found)


def named(path: str | Path) -> tuple[onnx.ModelProto, bool]:
    """A file in which every node has a name of its own, and whether some got it here: not all exporters give any.

    Raises as `read_model`.
    """
    model, seen = read_model(path), {""}
    bare = []
    for node in model.graph.node:
        if node.name in seen:
            bare.append(node)
        seen.add(node.name)
    for index, node in enumerate(bare):
        node.name = f"{node.op_type}_unnamed_{index}"
    return model, bool(bare)


@contextmanager
def _where(path: Path, model: onnx.ModelProto, changed: bool) -> Iterator[Path]:
    """Where the runtime finds the model: at `path`, unless it was changed. Raises BadOnnx."""
    if not changed:
        yield path
        return
    if beside := data_files(model):
        raise BadOnnx(
            "nodes have no names of their own, and the weights are in a data file", at=f"{path}, {', '.join(beside)}",
            effect="nothing was measured", fix="give every node a name",
        )
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, str(Path(folder) / path.name))
        yield Path(folder) / path.name


def _events(path: Path, threads: int, batch: int, runs: int) -> list[dict[str, Any]]:
    """One event per node and run, in order."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, threads=threads, profile_to=Path(folder))
        specs = input_specs(session, batch=batch, path=path)
        run = runner(session, random_feed(specs, seed=0), device="cpu")
        tried(run, path, specs)
        for _ in range(runs - 1):
            run()
        events = json.loads(Path(session.end_profiling()).read_text())
    return [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]


class _Layers:
    """Nodes of a file that multiply by an initializer.

    A fused matrix product keeps its name, behind "fused " or with the fusion's behind a slash. A convolution in blocks
    is named by the value it writes, its own or that of the activation or sum which went into it.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        shapes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
        self._waiting = {
            node.name: shapes[node.input[1]]
            for node in graph.node
            if node.op_type in MULTIPLY and _has_widths(node.op_type, shapes.get(node.input[1], ()))
        }
        self._writers: dict[str, list[str]] = defaultdict(list)
        for node in graph.node:  # in the order of computation
            known = [node.name] if node.name in self._waiting else []
            if node.op_type in ABSORBED:
                known = [writer for value in node.input for writer in self._writers.get(value, [])]
            for value in node.output:
                self._writers[value] += known

    def find(self, name: str, op: str, inputs: tuple[tuple[int, ...], ...]) -> str | None:
        own = name.removeprefix("fused ").partition("/")[0]
        if own in self._waiting:
            del self._waiting[own]
            return own
        for writer in self._writers.get(name.removesuffix("_nchwc"), []) if op == "Conv" else ():
            if writer in self._waiting and _blocked(self._waiting[writer], inputs[1]):
                del self._waiting[writer]
                return writer
        return None


def _has_widths(op: str, weight: tuple[int, ...]) -> bool:
    """A product with a vector or a stack of matrices has no two widths."""
    return len(weight) == 2 if op in ("Gemm", "MatMul") else len(weight) > 2


def _blocked(weight: tuple[int, ...], seen: tuple[int, ...]) -> bool:
    """onnxruntime fills channels up to whole blocks where it computes in blocks."""
    channels = zip(weight[:2], seen[:2], strict=True)
    return weight[2:] == seen[2:] and all(own <= filled < own + BLOCK for own, filled in channels)


def _shape(entry: Mapping[str, list[int]]) -> tuple[int, ...]:
    """{"float": [1, 3, 8, 8]} as (1, 3, 8, 8)."""
    return tuple(next(iter(entry.values())))
