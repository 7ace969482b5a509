"""`compare`: is the small file faster than the dense one, and by how much? `compare_networks`: the same in torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from export.candidates import Candidate
from export.errors import BadOnnx
from export.feeds import InputSpec, Shapes
from export.files import file_candidate
from export.latency import UNSTEADY, Latency, noise_warnings, summarise, timed
from export.machine import Machine
from export.networks import network_candidate, torch_as_asked
from export.settings import Settings
from export.statistics import NOISY, Interval, ratio_interval, unsteadiness, widened
from export.tensors import Examples

FASTER, SLOWER, SAME, NOISE = "faster", "slower", "no measurable difference", "too noisy to tell"


@dataclass(frozen=True)
class Comparison:
    """median(dense) / median(small) from the same rounds, with its 95 % interval.

    `noise` is the same ratio for the dense one against itself, loaded twice and run in the same rounds: what the
    machine makes of no difference at all. `low` to `high` is the bootstrap interval, widened by how far `noise` reaches
    from 1: where two copies of a file lie in memory alone moves their medians apart, by 0.1 to 0.3 % on a quiet
    machine. The bootstrap does not see that, and without the widening most comparisons of a file with itself
    found a difference.
    """

    speedup: float
    low: float
    high: float
    dense: Latency
    small: Latency
    noise: Interval
    machine: Machine
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """"faster" or "slower"; when the interval contains 1 "no measurable difference", or "too noisy to tell" if it
        is so wide that a difference of 10 % could hide in it.
        """
        return verdict_of(self.low, self.high)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, raw samples included; all times in milliseconds."""
        return {
            "speedup": self.speedup, "low": self.low, "high": self.high, "verdict": self.verdict,
            "noise": asdict(self.noise), "warnings": list(self.warnings), "machine": self.machine.as_dict(),
            "dense": self.dense.as_dict(), "small": self.small.as_dict(),
        }

    def __str__(self) -> str:
        where = f"{self.dense.setting}, {self.machine}"
        times = f"{self.dense.median:.3g} ms -> {self.small.median:.3g} ms"
        if self.verdict in (SAME, NOISE):
            return f"{self.verdict}: {times}, 95 % interval of the ratio {self.low:.3f} to {self.high:.3f}; {where}"
        factor, low, high = (
            (self.speedup, self.low, self.high)
            if self.verdict == FASTER
            else (1 / self.speedup, 1 / self.high, 1 / self.low)
        )
        return f"{factor:.2f}x {self.verdict} (95 % interval {low:.2f} to {high:.2f}): {times}; {where}"


def verdict_of(low: float, high: float) -> str:
    """What an interval of dense / small allows to be said."""
    if low <= 1 <= high:
        return NOISE if high > NOISY * low else SAME
    return FASTER if low > 1 else SLOWER


def compare(
    dense_path: str | Path,
    small_path: str | Path,
    *,
    device: str = "cpu",
    threads: int = 1,
    batch: int = 1,
    precision: str = "fp32",
    shapes: Shapes | None = None,
    seconds: float = 10.0,
    seed: int = 0,
) -> Comparison:
    """Run two ONNX files on the same random inputs in randomly interleaved rounds for about `seconds`.

    At least 100 rounds are run, or 30 if 100 would take more than four times `seconds`. Every round also runs the
    dense file a second time from a second session, as a control. The options, and the clock, are those of `measure`.

    Raises:
        BadOnnx: a file is missing, damaged, does not run, or the two take different inputs.
        CannotMeasure: an impossible option, another batch than a fixed one, a free axis without a size, or an operator
            that a GPU does not have.
        DeviceMissing: no such device here.
    """
    settings = Settings(device, threads, batch, seed, "onnx", precision)
    dense, small = (file_candidate(Path(path), settings, shapes) for path in (dense_path, small_path))
    _check_same_inputs(dense.inputs, small.inputs, Path(dense_path), Path(small_path))
    control = file_candidate(Path(dense_path), settings, shapes)
    return _timed(dense, control, small, settings, seconds)


def compare_networks(
    dense: nn.Module,
    small: nn.Module,
    example_inputs: Examples,
    *,
    runtime: str = "eager",
    device: str = "cpu",
    threads: int = 1,
    batch: int = 1,
    precision: str = "fp32",
    seconds: float = 10.0,
    seed: int = 0,
) -> Comparison:
    """Run copies of two networks in torch, as `compare` runs two files. The options are those of `measure_network`.

    Raises:
        NotExportable: no usable example inputs, or a network that cannot be copied.
        CannotMeasure: an impossible option, or a runtime that does not run one of them.
        DeviceMissing: no such device here.
    """
    settings = Settings(device, threads, batch, seed, runtime, precision)
    with torch_as_asked(settings):
        first, control, second = (network_candidate(model, example_inputs, settings) for model in (dense, dense, small))
        return _timed(first, control, second, settings, seconds)


def _timed(
    dense: Candidate, control: Candidate, small: Candidate, settings: Settings, seconds: float
) -> Comparison:
    rounds, machine, shared = timed([dense, control, small], settings, seconds)
    of_dense, of_control, of_small = rounds.milliseconds
    noise = ratio_interval(of_dense, of_control, seed=settings.seed)
    speedup = widened(ratio_interval(of_dense, of_small, seed=settings.seed), noise)
    return Comparison(
        speedup.value,
        speedup.low,
        speedup.high,
        summarise(of_dense, machine, settings, rounds.runs_per_sample[0], shared, dense),
        summarise(of_small, machine, settings, rounds.runs_per_sample[2], shared, small),
        noise,
        machine,
        shared + control_warnings(unsteadiness(of_dense / of_control)) + noise_warnings(speedup),
    )


def control_warnings(drift: float) -> tuple[str, ...]:
    """What the dense one against itself says about the result: `drift` is the unsteadiness of their ratio."""
    if drift > UNSTEADY:
        return (f"the dense network against itself varies by {drift:.1%} (standard deviation over ten parts)",)
    return ()


def _check_same_inputs(
    dense: tuple[InputSpec, ...], small: tuple[InputSpec, ...], dense_path: Path, small_path: Path
) -> None:
    if dense != small:
        raise BadOnnx(
            f"the files take different inputs: {', '.join(map(str, dense))} against {', '.join(map(str, small))}",
            at=f"{dense_path} and {small_path}", effect="nothing was measured",
            fix="export both networks with the same example inputs and input names",
        )
