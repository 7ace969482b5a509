"""How long one thing takes on this machine, with everything that the number depends on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from export.candidates import Candidate
from export.clocks import clock_for
from export.feeds import InputSpec
from export.machine import Machine, load_average, this_machine
from export.rounds import MIN_ROUNDS, Rounds, run_rounds
from export.settings import Settings
from export.statistics import NOISY, Interval, median_interval, quantile

# The threshold of NVIDIA's trtexec, above which it calls its own numbers unstable.
UNSTEADY = 0.025
# Of the time that rounds take, what samples account for on a quiet machine is more than 0.97.
BUSY = 0.9


@dataclass(frozen=True)
class Latency:
    """Milliseconds per run of a batch: median with 95 % interval, p90 and p99, every sample in order.

    p90 is None below 64 samples and p99 below 662. `runs_per_sample` is above 1 for networks so fast that a sample is
    the mean of several runs. `warnings` say why the numbers may mislead. `inputs` is what was fed. `clock` is "core"
    for one thread on a CPU, whose time is that on a core, without waiting for one while others have it; "wall" for
    several threads and for onnxruntime on a GPU; "cuda events" for torch there.
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
    p99: float | None = None
    runtime: str = "onnx"
    precision: str = "fp32"
    inputs: tuple[InputSpec, ...] = ()
    clock: str = "wall"

    @property
    def throughput(self) -> float:
        """Inputs per second at the median."""
        return self.batch / self.median * 1000

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, raw samples included; all times in milliseconds."""
        return {
            "median": self.median, "low": self.low, "high": self.high, "p90": self.p90, "p99": self.p99,
            "throughput": self.throughput, "runtime": self.runtime, "precision": self.precision,
            "threads": self.threads, "batch": self.batch, "device": self.device, "clock": self.clock,
            "warnings": list(self.warnings), "runs_per_sample": self.runs_per_sample,
            "inputs": [one.as_dict() for one in self.inputs],
            "machine": self.machine.as_dict(), "samples": list(self.samples),
        }

    @property
    def setting(self) -> str:
        """What it holds for, in words."""
        words = f"{self.runtime} in {self.precision} on {self.device}, batch {self.batch}"
        timed = " timed by the core" * (self.clock == "core")
        return f"{words}, {self.threads} thread{'s' * (self.threads > 1)}{timed}"

    def __str__(self) -> str:
        return (
            f"{self.median:.3g} ms (95 % interval {self.low:.3g} to {self.high:.3g}), {self.setting}, {self.machine}"
        )


def timed(
    candidates: Sequence[Candidate], settings: Settings, seconds: float
) -> tuple[Rounds, Machine, tuple[str, ...]]:
    """Interleaved rounds of all, the machine they were run on, and what there may have misled them."""
    before, runs = this_machine(), [candidate.run for candidate in candidates]
    rounds = run_rounds(runs, seconds=seconds, seed=settings.seed, timer=clock_for(settings).timer)
    machine = replace(before, load_after=load_average())
    return rounds, machine, environment_warnings(machine, rounds, settings)


def summarise(
    samples: npt.NDArray[np.float64],
    machine: Machine,
    settings: Settings,
    runs: int,
    warnings: tuple[str, ...],
    candidate: Candidate,
) -> Latency:
    """Samples (rounds,) in milliseconds as a Latency."""
    median = median_interval(samples, seed=settings.seed)
    return Latency(
        median.value, median.low, median.high, quantile(samples, 0.9), tuple(samples.tolist()), machine,
        settings.threads, settings.batch, settings.device, runs, warnings + noise_warnings(median),
        quantile(samples, 0.99), settings.runtime, candidate.precision, candidate.inputs,
        clock_for(settings).name,
    )


def noise_warnings(found: Interval) -> tuple[str, ...]:
    """An interval too wide to be of use is called that."""
    if found.high <= NOISY * found.low:
        return ()
    return (f"too noisy to measure here, now: the 95 % interval is {found.low:.3g} to {found.high:.3g}",)


def environment_warnings(machine: Machine, rounds: Rounds, settings: Settings) -> tuple[str, ...]:
    """Why numbers from this machine, now, may mislead."""
    found = []
    if clock_for(settings).name == "core" and rounds.busy < BUSY:
        found.append(
            f"other work had the core for {1 - rounds.busy:.0%} of the time, which is not counted: by the wall clock "
            f"all took {1 / rounds.busy:.2g} times as long"
        )
    if machine.load_before is not None and machine.load_before > machine.cores / 2:
        found.append(f"other work was running: load {machine.load_before:g} on {machine.cores:g} usable cores")
    if settings.device == "cpu" and settings.threads > machine.cores:
        found.append(f"{settings.threads} threads take turns on {machine.cores:g} usable cores")
    if rounds.count < MIN_ROUNDS:
        found.append(f"only {rounds.count} rounds instead of {MIN_ROUNDS}, because a run takes so long")
    return tuple(found)
