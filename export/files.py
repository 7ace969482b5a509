"""ONNX files as candidates: what onnxruntime runs, on random inputs."""

from pathlib import Path

from onnx import TensorProto

from export.candidates import Candidate
from export.errors import CannotMeasure
from export.feeds import Shapes, input_specs, random_feed, runner, tried
from export.sessions import open_session, stored_types
from export.settings import Settings

WEIGHTS: dict[int, str] = {
    TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16", TensorProto.DOUBLE: "fp64",
    TensorProto.INT8: "int8", TensorProto.UINT8: "int8",
}


def file_candidate(path: Path, settings: Settings, shapes: Shapes | None) -> Candidate:
    """The file, tried once.

    Raises:
        BadOnnx: it is missing, damaged, or loads but does not run on inputs of the shapes it declares.
        CannotMeasure: a batch, shape or precision that it does not have.
        DeviceMissing: no such device here.
    """
    session = open_session(
        path, device=settings.device, threads=settings.threads, batch=settings.batch, tf32=settings.precision == "tf32"
    )
    specs = input_specs(session, batch=settings.batch, path=path, shapes=shapes)
    precision = _precision(path, settings.precision)
    run = runner(session, random_feed(specs, seed=settings.seed), device=settings.device)
    tried(run, path, specs)
    return Candidate(run, specs, precision)


def _precision(path: Path, asked: str) -> str:
    """What the file computes in: most of its weights have it, so only for those of 32 bits there is a choice."""
    held = stored_precision(path)
    if held == asked or asked == "fp32" or (held, asked) == ("fp32", "tf32"):
        return asked if held == "fp32" else held
    raise CannotMeasure(
        f"precision {asked} asked of a file whose weights are {held}", at=str(path), effect="nothing was run",
        fix=f"convert the file to {asked} and measure that one",
    )


def stored_precision(path: Path) -> str:
    """The type of most of a file's weights, by number; "fp32" for a file without any."""
    counts = dict.fromkeys(WEIGHTS.values(), 0)
    for kind, values in stored_types(path).items():
        if kind in WEIGHTS:
            counts[WEIGHTS[kind]] += values
    return max(counts, key=counts.__getitem__)
