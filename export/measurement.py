"""`measure`: how long an ONNX file takes on this machine; `measure_network`: a network in torch."""

from pathlib import Path

from torch import nn

from export.candidates import Candidate
from export.feeds import Shapes
from export.files import file_candidate
from export.latency import UNSTEADY, Latency, summarise, timed
from export.networks import network_candidate, torch_as_asked
from export.settings import Settings
from export.statistics import unsteadiness
from export.tensors import Examples


def measure(
    path: str | Path,
    *,
    device: str = "cpu",
    threads: int = 1,
    batch: int = 1,
    precision: str = "fp32",
    shapes: Shapes | None = None,
    seconds: float = 5.0,
    seed: int = 0,
) -> Latency:
    """Run an ONNX file in onnxruntime on random inputs for about `seconds`, at least 100 times.

    One thread on a CPU is timed by the core, so that other work on the machine counts little (`Latency.clock`).
    A network so slow that 100 runs take more than four times `seconds` is run at least 30 times, with a warning.
    To say which of two files is faster use `compare`: two calls of `measure` see two different machines.

    Args:
        precision: "fp32", or "tf32" on a GPU. The result names that of the weights where they are not of 32 bits.
        shapes: for files with free axes beside the batch: by the name of an input the sizes of all axes but the first.

    Raises:
        BadOnnx: the file is missing, damaged, or does not run.
        CannotMeasure: an impossible option, another batch than a fixed one, a free axis without a size, or an operator
            that a GPU does not have.
        DeviceMissing: no such device here.
    """
    settings = Settings(device, threads, batch, seed, "onnx", precision)
    return _timed(file_candidate(Path(path), settings, shapes), settings, seconds)


def measure_network(
    model: nn.Module,
    example_inputs: Examples,
    *,
    runtime: str = "eager",
    device: str = "cpu",
    threads: int = 1,
    batch: int = 1,
    precision: str = "fp32",
    seconds: float = 5.0,
    seed: int = 0,
) -> Latency:
    """Run a copy of a network in torch, as `measure` runs a file; on a GPU timed by CUDA events.

    Args:
        example_inputs: a tensor, or a tuple with a tensor per argument of forward, repeated or shortened to `batch`.
        runtime: "eager", "compile" (the whole network by torch.compile, or an error), or "cuda-graph" on a GPU.
        precision: "fp32", "fp16" (weights and inputs), or "tf32" on a GPU.

    Raises:
        NotExportable: no usable example inputs, or a network that cannot be copied.
        CannotMeasure: an impossible option, or a runtime that does not run this network.
        DeviceMissing: no such device here.
    """
    settings = Settings(device, threads, batch, seed, runtime, precision)
    with torch_as_asked(settings):
        return _timed(network_candidate(model, example_inputs, settings), settings, seconds)


def _timed(candidate: Candidate, settings: Settings, seconds: float) -> Latency:
    rounds, machine, warnings = timed([candidate], settings, seconds)
    samples = rounds.milliseconds[0]
    if (drift := unsteadiness(samples)) > UNSTEADY:
        warnings += (f"the median moved by {drift:.1%} (standard deviation) during the measurement",)
    return summarise(samples, machine, settings, rounds.runs_per_sample[0], warnings, candidate)
