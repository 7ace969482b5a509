"""Timing several candidates side by side: in every round each runs once, in random order.

One after the other, a change of the machine's load falls on one candidate and looks like a difference between them: an
identical pair came out up to 26 % apart that way, and 4 % in interleaved rounds.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from export.errors import CannotMeasure

WARM_UP_RUNS = 10
WARM_UP_SECONDS = 0.2
MIN_ROUNDS = 100
# A slow network may take this many times the seconds asked for to reach MIN_ROUNDS; after that, this many rounds do.
PATIENCE = 4
MIN_ROUNDS_SLOW = 30
# More add nothing to the interval, only to the file of raw samples.
MAX_ROUNDS = 20_000
# A visit shorter than this is mostly clock and call: the candidate runs several times, and the sample is their mean.
VISIT_NS = 200_000

Run = Callable[[], object]
Timer = Callable[[Run, int], float]
"""Runs a candidate so many times and returns the milliseconds of one, when all results are there."""


@dataclass(frozen=True)
class Rounds:
    """Milliseconds per run, (candidates, rounds), in the order of the rounds, and how many runs one sample averages.

    `busy` is the share of the time that the rounds took which is in the samples.
    """

    milliseconds: npt.NDArray[np.float64]
    runs_per_sample: tuple[int, ...]
    busy: float = 1.0

    @property
    def count(self) -> int:
        return int(self.milliseconds.shape[1])


def run_rounds(
    candidates: Sequence[Run],
    *,
    seconds: float,
    seed: int,
    clock: Callable[[], int] = time.perf_counter_ns,
    timer: Timer | None = None,
) -> Rounds:
    """Warm up every candidate, then run rounds for about `seconds`, but at least MIN_ROUNDS of them.

    Where MIN_ROUNDS would take more than PATIENCE times `seconds`, MIN_ROUNDS_SLOW are enough: the time is bounded by
    the larger of PATIENCE * seconds and MIN_ROUNDS_SLOW rounds, plus the warm-up.

    Args:
        clock: a monotonic clock in nanoseconds, which ends the rounds.
        timer: what takes a sample; by default `clock` does.

    Raises:
        CannotMeasure: `seconds` is not positive, or has no end.
    """
    if not 0 < seconds < inf:
        raise CannotMeasure(
            f"{seconds} seconds asked", at="seconds", effect="nothing was run", fix="ask for more than 0, and an end"
        )
    visit = timer or (lambda run, repeats: wall_timer(run, repeats, clock))
    repeats = [max(1, -(-VISIT_NS // max(1, _warm_up(run, clock, visit)))) for run in candidates]
    order = np.random.default_rng(seed)
    rows: list[list[float]] = []
    start = clock()
    while len(rows) < MAX_ROUNDS:
        elapsed = (clock() - start) / 1e9
        if elapsed >= seconds and len(rows) >= MIN_ROUNDS:
            break
        if elapsed >= PATIENCE * seconds and len(rows) >= MIN_ROUNDS_SLOW:
            break
        row = [0.0] * len(candidates)
        for index in order.permutation(len(candidates)):
            row[index] = visit(candidates[index], repeats[index])
        rows.append(row)
    milliseconds = np.array(rows).T
    sampled = float((milliseconds.sum(axis=1) * repeats).sum())
    return Rounds(milliseconds, tuple(repeats), sampled / max((clock() - start) / 1e6, sampled, 1e-9))


def wall_timer(run: Run, repeats: int, clock: Callable[[], int] = time.perf_counter_ns) -> float:
    """Milliseconds of a run, all that happens meanwhile included."""
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / 1e6 / repeats


def _warm_up(run: Run, clock: Callable[[], int], visit: Timer) -> int:
    """Run until caches, allocator and clock speed have settled; the nanoseconds of a settled run."""
    durations: list[int] = []
    start = clock()
    while len(durations) < WARM_UP_RUNS or clock() - start < WARM_UP_SECONDS * 1e9:
        before = clock()
        visit(run, 1)
        durations.append(clock() - before)
    return int(np.median(durations[len(durations) // 2 :]))
