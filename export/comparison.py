"""`compare`: is the small file faster than the dense one, and by how much?"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from export.errors import BadOnnx
from export.feeds import InputSpec
from export.latency import UNSTEADY, Latency, Settings, environment_warnings, prepare, summarise
from export.machine import Machine, load_average, this_machine
from export.rounds import run_rounds
from export.statistics import Interval, ratio_interval, unsteadiness, widened

FASTER, SLOWER, SAME = "faster", "slower", "no measurable difference"


@dataclass(frozen=True)
class Comparison:
    """median(dense) / median(small) from the same rounds, with its 95 % interval.

    `noise` is the same ratio for the dense file against itself, loaded twice and run in the same rounds: what the
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
        """"faster", "slower", or "no measurable difference" when the interval contains 1."""
        if self.low <= 1 <= self.high:
            return SAME
        return FASTER if self.low > 1 else SLOWER

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, raw samples included; all times in milliseconds."""
        return {
            "speedup": self.speedup, "low": self.low, "high": self.high, "verdict": self.verdict,
            "noise": asdict(self.noise), "warnings": list(self.warnings), "machine": self.machine.as_dict(),
            "dense": self.dense.as_dict(), "small": self.small.as_dict(),
        }

    def __str__(self) -> str:
        where = (
            f"batch {self.dense.batch}, {self.dense.device}, {self.dense.threads} "
            f"thread{'s' * (self.dense.threads > 1)}, {self.machine}"
        )
        times = f"{self.dense.median:.3g} ms -> {self.small.median:.3g} ms"
        if self.verdict == SAME:
            return f"{SAME}: {times}, 95 % interval of the ratio {self.low:.3f} to {self.high:.3f}; {where}"
        factor, low, high = (
            (self.speedup, self.low, self.high)
            if self.verdict == FASTER
            else (1 / self.speedup, 1 / self.high, 1 / self.low)
        )
        return f"{factor:.2f}x {self.verdict} (95 % interval {low:.2f} to {high:.2f}): {times}; {where}"


def compare(
    dense_path: str | Path,
    small_path: str | Path,
    *,
    device: str = "cpu",
    threads: int = 1,
    batch: int = 1,
    seconds: float = 10.0,
    seed: int = 0,
) -> Comparison:
    """Run two ONNX files on the same random inputs in randomly interleaved rounds for about `seconds`.

    At least 100 rounds are run, or 30 if 100 would take more than four times `seconds`. Every round also runs the
    dense file a second time from a second session, as a control.

    Raises:
        BadOnnx: a file is missing, damaged, does not run, or the two take different inputs.
        CannotMeasure: an impossible option, another batch than a fixed one, a free axis beside the batch.
        DeviceMissing: no such device here.
    """
    settings = Settings(device, threads, batch, seed)
    dense, dense_inputs = prepare(Path(dense_path), settings)
    small, small_inputs = prepare(Path(small_path), settings)
    _check_same_inputs(dense_inputs, small_inputs, Path(dense_path), Path(small_path))
    control, _ = prepare(Path(dense_path), settings)

    before = this_machine()
    rounds = run_rounds([dense, control, small], seconds=seconds, seed=seed)
    machine = replace(before, load_after=load_average())
    of_dense, of_control, of_small = rounds.milliseconds
    noise = ratio_interval(of_dense, of_control, seed=seed)
    speedup = widened(ratio_interval(of_dense, of_small, seed=seed), noise)
    shared = environment_warnings(machine, rounds.count)
    return Comparison(
        speedup.value,
        speedup.low,
        speedup.high,
        summarise(of_dense, machine, settings, rounds.runs_per_sample[0], shared),
        summarise(of_small, machine, settings, rounds.runs_per_sample[2], shared),
        noise,
        machine,
        shared + control_warnings(unsteadiness(of_dense / of_control)),
    )


def control_warnings(drift: float) -> tuple[str, ...]:
    """What the dense file against itself says about the result: `drift` is the unsteadiness of their ratio."""
    if drift > UNSTEADY:
        return (f"the dense file against itself varies by {drift:.1%} (standard deviation over ten parts)",)
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
