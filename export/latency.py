"""`measure`: how long one ONNX file takes on this machine."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import BadOnnx
from export.feeds import Feed, InputSpec, input_specs, random_feed, runner
from export.machine import Machine, load_average, this_machine
from export.rounds import MIN_ROUNDS, run_rounds
from export.sessions import open_session
from export.statistics import median_interval, quantile, unsteadiness

# The threshold of NVIDIA's trtexec, above which it calls its own numbers unstable.
UNSTEADY = 0.025


@dataclass(frozen=True)
class Latency:
    """Milliseconds per run of a batch: median with 95 % interval, p90 (None below 64 samples), every sample in order.

    `runs_per_sample` is above 1 for networks so fast that a sample is the mean of several runs. `warnings` say why the
    numbers may mislead.
    """

    median: float
    low: float
    high: float
    p90: float | None
    samples: tuple[float, ...]
    machine: Machine
    threads: int
    batch: int
    device: str
    runs_per_sample: int
    warnings: tuple[str, ...]

    @property
    def throughput(self) -> float:
        """Inputs per second at the median."""
        return self.batch / self.median * 1000

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, raw samples included; all times in milliseconds."""
        return {
            "median": self.median, "low": self.low, "high": self.high, "p90": self.p90, "throughput": self.throughput,
            "threads": self.threads, "batch": self.batch, "device": self.device, "warnings": list(self.warnings),
            "runs_per_sample": self.runs_per_sample, "machine": self.machine.as_dict(), "samples": list(self.samples),
        }

    def __str__(self) -> str:
        return (
            f"{self.median:.3g} ms (95 % interval {self.low:.3g} to {self.high:.3g}), "
            f"batch {self.batch}, {self.device}, {self.threads} thread{'s' * (self.threads > 1)}, {self.machine}"
        )


@dataclass(frozen=True)
class Settings:
    """What a latency holds for."""

    device: str
    threads: int
    batch: int
    seed: int


def measure(
    path: str | Path,
    *,
    device: str = "cpu",
    threads: int = 1,
    batch: int = 1,
    seconds: float = 5.0,
    seed: int = 0,
) -> Latency:
    """Run an ONNX file in onnxruntime on random inputs for about `seconds`, at least 100 times.

    A network so slow that 100 runs take more than four times `seconds` is run at least 30 times, with a warning.
    To say which of two files is faster use `compare`: two calls of `measure` see two different machines.

    Raises:
        BadOnnx: the file is missing, damaged, or does not run.
        CannotMeasure: an impossible option, another batch than a fixed one, a free axis beside the batch.
        DeviceMissing: no such device here.
    """
    settings = Settings(device, threads, batch, seed)
    candidate, _ = prepare(Path(path), settings)
    before = this_machine()
    rounds = run_rounds([candidate], seconds=seconds, seed=seed)
    machine = replace(before, load_after=load_average())
    samples = rounds.milliseconds[0]
    warnings = environment_warnings(machine, rounds.count)
    if (drift := unsteadiness(samples)) > UNSTEADY:
        warnings += (f"the median moved by {drift:.1%} (standard deviation) during the measurement",)
    return summarise(samples, machine, settings, rounds.runs_per_sample[0], warnings)


def prepare(path: Path, settings: Settings) -> tuple[Callable[[], object], tuple[InputSpec, ...]]:
    """A function that runs the file once, tried once, and the inputs it is fed with.

    Raises:
        BadOnnx: the file loads, but does not run on inputs of the shapes it declares.
    """
    session = open_session(path, device=settings.device, threads=settings.threads)
    specs = input_specs(session, batch=settings.batch, path=path)
    feed: Feed = random_feed(specs, seed=settings.seed)
    run = runner(session, feed, device=settings.device)
    try:
        run()
    except Exception as error:
        raise BadOnnx(
            f"onnxruntime cannot run the file: {' '.join(str(error).split())}",
            at=f"{path} with {', '.join(map(str, specs))}", effect="nothing was measured",
            fix="export the network again; export.to_onnx tries several batch sizes before it hands out a file",
        ) from error
    return run, specs


def summarise(
    samples: npt.NDArray[np.float64], machine: Machine, settings: Settings, runs: int, warnings: tuple[str, ...]
) -> Latency:
    """Samples (rounds,) in milliseconds as a Latency."""
    median = median_interval(samples, seed=settings.seed)
    return Latency(
        median.value, median.low, median.high, quantile(samples, 0.9), tuple(samples.tolist()), machine,
        settings.threads, settings.batch, settings.device, runs, warnings,
    )


def environment_warnings(machine: Machine, rounds: int) -> tuple[str, ...]:
    """Why numbers from this machine, now, may mislead."""
    found = []
    if machine.load_before is not None and machine.load_before > machine.cores / 2:
        found.append(f"other work was running: load {machine.load_before:g} on {machine.cores:g} usable cores")
    if rounds < MIN_ROUNDS:
        found.append(f"only {rounds} rounds instead of {MIN_ROUNDS}, because a run takes so long")
    return tuple(found)
