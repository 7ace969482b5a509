"""Opening an ONNX file in onnxruntime: always the same options, never a silent fallback."""

import math
import os
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from export.errors import BadOnnx, CannotMeasure, DeviceMissing, one_line
from export.settings import DEVICES, at_least_one, known

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(
    path: str | Path,
    *,
    device: str = "cpu",
    threads: int = 1,
    batch: int = 1,
    tf32: bool = False,
    profile_to: Path | None = None,
) -> Any:
    """An onnxruntime.InferenceSession on `device`, fully optimised, with `threads` threads inside an operator.

    On the CPU files with float16 do without the fusion of transposes into matrix products, which ends the process for a
    vision transformer (onnxruntime 1.32).

    Several threads do not spin while they wait: the idle workers of one session would eat the cores of the next one,
    which makes every comparison between two loaded models wrong by up to a factor of two.
    `profile_to` is a folder for the profile that `end_profiling` of a session on the CPU writes.

    On a GPU every operator runs there, or the session is refused. A free batch is fixed to `batch` there: what a free
    one needs to compute shapes would run on the CPU. With `tf32` float32 is multiplied with 10 bits of mantissa.

    Raises:
        BadOnnx: the file or its data file is missing or damaged, or an operator in it is unknown to onnxruntime.
        CannotMeasure: an unknown device name, no threads, or an operator that the device does not have.
        DeviceMissing: onnxruntime or the machine lacks the device.
    """
    check_device(device)
    at_least_one(threads, f"{threads} threads", at="threads")
    file = Path(path)
    on_cpu = _on_cpu(file, threads, profile_to)
    return on_cpu if device == "cpu" else _on_gpu(file, on_cpu, threads=threads, batch=batch, tf32=tf32)


def _on_cpu(file: Path, threads: int, profile_to: Path | None) -> Any:
    options = _options(threads, profile_to)
    half = onnx.TensorProto.FLOAT16 in stored_types(file)
    without: dict[str, Any] = {"disabled_optimizers": ["MatmulTransposeFusion"]} if half else {}
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=[PROVIDERS["cpu"]], **without)
    except Exception as error:
        raise _damaged(file, f"onnxruntime {onnxruntime.__version__}", error) from error


def _on_gpu(file: Path, on_cpu: Any, *, threads: int, batch: int, tf32: bool) -> Any:
    """`on_cpu` is the same file, loaded there: the file is sound, and names its free axes."""
    options = _options(threads)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for name in {value.shape[0] for value in on_cpu.get_inputs() if value.shape}:
        if isinstance(name, str):
            options.add_free_dimension_override_by_name(name, batch)
    provider = (PROVIDERS["cuda"], {"use_tf32": str(int(tf32))})
    try:
        # Without fallback: else onnxruntime prints the error and goes on with the CPU.
        session = onnxruntime.InferenceSession(str(file), options, providers=[provider], enable_fallback=0)
    except Exception as error:
        if "CPU EP" in str(error):
            raise CannotMeasure(
                "onnxruntime has some of the operators for the CPU only", at=f"{file} on cuda",
                effect="nothing was run; a mix of GPU and CPU would be neither's latency",
                fix="export with all axes fixed, or use device='cpu'",
            ) from error
        raise DeviceMissing(
            f"onnxruntime cannot start on cuda: {one_line(error)}", at=str(file), effect="nothing was run",
            fix="check driver, CUDA and cuDNN; the file itself loads on the CPU",
        ) from error
    if session.get_providers()[0] != PROVIDERS["cuda"]:
        raise DeviceMissing(
            f"asked was cuda, onnxruntime fell back to {session.get_providers()[0]}", at=str(file),
            effect="nothing was run", fix="check that a GPU, its driver, CUDA and cuDNN are there",
        )
    return session


def _options(threads: int, profile_to: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # errors come as exceptions
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to / "profile")
    if threads > 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def check_device(device: str) -> None:
    """Raise CannotMeasure for a name that is no device, DeviceMissing for one that this onnxruntime lacks."""
    known("device", device, DEVICES)
    if device == "cuda" and hasattr(onnxruntime, "preload_dlls") and "cuda" in _built_for():
        onnxruntime.preload_dlls()  # lets onnxruntime use the CUDA libraries that torch brought along
    if device not in _built_for():
        raise DeviceMissing(
            f"onnxruntime {onnxruntime.__version__} here runs on {', '.join(_built_for())} only, asked was {device}",
            at="onnxruntime.get_available_providers()", effect="nothing was run; there is no fallback",
            fix="install onnxruntime-gpu in place of onnxruntime on a machine with a CUDA GPU, or use device='cpu'",
        )


def read_model(path: str | Path) -> onnx.ModelProto:
    """A file without what lies in a data file beside it, which must be there: onnxruntime explains that badly.

    Raises:
        BadOnnx: it is missing or damaged, or its data file is missing.
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise BadOnnx(
            f"there is no such file{': it is a folder' * file.is_dir()}", at=str(file), effect="nothing was run",
            fix="check the path; export the model first",
        )
    try:
        model = onnx.load(str(file), format="protobuf", load_external_data=False)
    except Exception as error:
        raise _damaged(file, f"onnx {onnx.__version__}", error) from error
    if missing := [name for name in data_files(model) if not (file.parent / name).is_file()]:
        raise BadOnnx(
            f"the weights are in {', '.join(missing)}, which is not there", at=str(file), effect="nothing was run",
            fix="put the data file beside the ONNX file, under this very name",
        )
    return model


def stored_types(file: Path) -> Mapping[int, int]:
    """How many values of each type a file holds, by onnx's number of the type; 0 of one that it casts to.

    Read once as long as the file stays what it is: it is asked at every opening. Raises as `read_model`.
    """
    if not file.is_file():
        read_model(file)  # says why not
    now = file.stat()
    counts, beside = _stored(file, now.st_ino, now.st_mtime_ns, now.st_size)
    if not all((file.parent / name).is_file() for name in beside):
        read_model(file)
    return counts


@cache
def _stored(file: Path, *_: int) -> tuple[Mapping[int, int], list[str]]:
    """The same, and the names of data files."""
    model, counts = read_model(file), Counter[int]()
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    # Some exporters write constants in the place of initializers.
    for tensor in (*model.graph.initializer, *(a.t for n in constants for a in n.attribute if a.name == "value")):
        counts[tensor.data_type] += math.prod(tensor.dims)
    casts = (node for node in model.graph.node if node.op_type == "Cast")
    counts.update({a.i: 0 for node in casts for a in node.attribute if a.name == "to"})
    return counts, data_files(model)


def data_files(model: onnx.ModelProto) -> list[str]:
    """Names of the files beside it that hold weights."""
    tensors = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    return sorted({entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"})


def _damaged(file: Path, reader: str, error: Exception) -> BadOnnx:
    return BadOnnx(
        f"{reader} cannot load the file: {one_line(error)}",
        at=f"{file}, {file.stat().st_size} bytes", effect="nothing was run",
        fix="write the file again (a damaged copy has another sha256); use only operators of the standard domain",
    )


def _built_for() -> list[str]:
    available = onnxruntime.get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in available]
