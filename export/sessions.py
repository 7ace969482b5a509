"""Opening an ONNX file in onnxruntime: always the same options, never a silent fallback."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from export.errors import BadOnnx, CannotMeasure, DeviceMissing

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(path: str | Path, *, device: str = "cpu", threads: int = 1) -> Any:
    """An onnxruntime.InferenceSession on `device`, fully optimised, with `threads` threads inside an operator.

    Several threads do not spin while they wait: the idle workers of one session would eat the cores of the next one,
    which makes every comparison between two loaded models wrong by up to a factor of two.

    Raises:
        BadOnnx: the file or its data file is missing or damaged, or it holds an operator that onnxruntime does not know
            or that is outside the standard domain, which only some runtimes know.
        CannotMeasure: an unknown device name, or no threads.
        DeviceMissing: onnxruntime or the machine lacks the device.
    """
    check_device(device)
    if threads < 1:
        raise CannotMeasure(f"{threads} threads asked", at="threads", effect="nothing was run", fix="ask for 1 or more")
    file = Path(path)
    if not file.is_file():
        raise BadOnnx(
            "there is no such file", at=str(file), effect="nothing was run",
            fix="check the path; export the model first",
        )
    _require_portable(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors only
    if threads > 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=[PROVIDERS[device]])
    except Exception as error:
        if device == "cuda":
            on_cpu = open_session(file, threads=threads)
            raise DeviceMissing(
                f"onnxruntime cannot start on cuda: {_one_line(error)}", at=str(file), effect="nothing was run",
                fix=f"check driver, CUDA and cuDNN; the file itself loads on {on_cpu.get_providers()[0]}",
            ) from error
        raise _damaged(file, f"onnxruntime {onnxruntime.__version__}", error) from error
    if session.get_providers()[0] != PROVIDERS[device]:
        raise DeviceMissing(
            f"asked was {device}, onnxruntime fell back to {session.get_providers()[0]}", at=str(file),
            effect="nothing was run", fix="check that a GPU, its driver, CUDA and cuDNN are there",
        )
    return session


def check_device(device: str) -> None:
    """Raise CannotMeasure for a name that is no device, DeviceMissing for one that this onnxruntime lacks."""
    if device not in PROVIDERS:
        raise CannotMeasure(
            f"device {device!r} is not known", at="device", effect="nothing was run",
            fix=f"use one of {', '.join(map(repr, PROVIDERS))}",
        )
    if device == "cuda" and hasattr(onnxruntime, "preload_dlls") and "cuda" in _built_for():
        onnxruntime.preload_dlls()  # lets onnxruntime use the CUDA libraries that torch brought along
    if device not in _built_for():
        raise DeviceMissing(
            f"onnxruntime {onnxruntime.__version__} here runs on {', '.join(_built_for())} only, asked was {device}",
            at="onnxruntime.get_available_providers()", effect="nothing was run; there is no fallback",
            fix="install onnxruntime-gpu in place of onnxruntime on a machine with a CUDA GPU, or use device='cpu'",
        )


def _require_portable(file: Path) -> None:
    """Refuse what onnxruntime might run, or explain badly: operators of its own domains, a data file left behind."""
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:
        raise _damaged(file, f"onnx {onnx.__version__}", error) from error
    tensors = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    data = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    if missing := sorted(name for name in data if not (file.parent / name).is_file()):
        raise BadOnnx(
            f"the weights are in {', '.join(missing)}, which is not there", at=str(file), effect="nothing was run",
            fix="put the data file beside the ONNX file, under this very name",
        )
    known = {"", "ai.onnx", *(function.domain for function in model.functions)}
    for node in _nodes([*model.graph.node, *(node for function in model.functions for node in function.node)]):
        if node.domain not in known:
            raise BadOnnx(
                f"operator {node.domain}.{node.op_type} is not standard ONNX", at=f"{file}, node {node.name or '?'}",
                effect="nothing was run: other runtimes cannot load the file",
                fix="export with standard operators only; a file that one runtime optimised runs nowhere else",
            )


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def _damaged(file: Path, reader: str, error: Exception) -> BadOnnx:
    return BadOnnx(
        f"{reader} cannot load the file: {_one_line(error)}",
        at=f"{file}, {file.stat().st_size} bytes", effect="nothing was run",
        fix="write the file again (a damaged copy has another sha256); use only operators of the standard domain",
    )


def _built_for() -> list[str]:
    available = onnxruntime.get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in available]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
