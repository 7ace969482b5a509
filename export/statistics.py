"""Medians with intervals, for samples that are neither independent nor normal.

Legend: n samples, in the order in which they were taken; r resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Samples = Sequence[float] | npt.NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
# The fewest samples of which, with a chance of 99 %, at least two lie beyond the quantile (binomial). With less, a
# "p99" is only another name for the maximum.
SAMPLE_FLOORS = {0.9: 64, 0.95: 130, 0.97: 219, 0.99: 662}
# An interval whose ends differ by more than this factor could hide a difference of 10 % to either side.
NOISY = 1.2
# Resampled values held at once: bounds the memory of a bootstrap over many samples to some ten megabytes.
CHUNK = 1_000_000
# Of a series of samples, to see whether its level drifts.
PARTS = 10


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval, low <= value <= high, in the unit of the samples."""

    value: float
    low: float
    high: float

    def contains(self, number: float) -> bool:
        return self.low <= number <= self.high


def median_interval(samples: Samples, *, seed: int) -> Interval:
    """The median of samples (n,) and its 95 % moving-block bootstrap interval."""
    return _bootstrap((samples,), lambda medians: medians[0], seed, RESAMPLES)


def ratio_interval(numerator: Samples, denominator: Samples, *, seed: int, resamples: int = RESAMPLES) -> Interval:
    """median(numerator) / median(denominator) and its 95 % interval, for pairs taken in the same rounds.

    Paired: a resample draws the same rounds from both, so that load which slows down a whole round cancels. In blocks
    of neighbouring rounds (Kunsch 1989), because load lasts: drawn one by one, correlated samples would look more
    certain than they are.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    return _bootstrap((numerator, denominator), lambda medians: medians[0] / medians[1], seed, resamples)


def widened(ratio: Interval, control: Interval) -> Interval:
    """`ratio` with both ends moved out by the largest factor by which `control`, in truth 1, may differ from 1."""
    factor = max(control.high, 1 / control.low, 1.0)
    return Interval(ratio.value, ratio.low / factor, ratio.high * factor)


def quantile(samples: Samples, share: float) -> float | None:
    """The quantile (0.9, 0.95, 0.97 or 0.99) of samples (n,), None if n is too small to know it.

    Raises:
        ValueError: another share, whose floor is not known.
    """
    if share not in SAMPLE_FLOORS:
        raise ValueError(f"quantile {share} asked, known are {sorted(SAMPLE_FLOORS)}")
    return float(np.quantile(samples, share)) if len(samples) >= SAMPLE_FLOORS[share] else None


def unsteadiness(samples: Samples) -> float:
    """Standard deviation over mean of the medians of PARTS consecutive parts: how much the level drifts.

    Of medians, since single runs on a shared machine have outliers that no reported number depends on.
    """
    medians = np.array([np.median(part) for part in np.array_split(np.asarray(samples, float), PARTS) if len(part)])
    return float(medians.std() / medians.mean())


def _bootstrap(
    series: Sequence[Samples],
    statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    seed: int,
    resamples: int,
) -> Interval:
    """`statistic` maps medians (series, r) to (r,)."""
    lengths = sorted({len(one) for one in series})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(f"series of equal, positive length needed, got lengths {[len(one) for one in series]}")
    data = np.asarray(series, dtype=np.float64)
    n = data.shape[1]
    block = int(np.ceil(n ** (1 / 3)))  # the usual rate: grows with n, but more slowly than the number of blocks
    generator = np.random.default_rng(seed)
    values = []
    step = max(1, CHUNK // (n * len(data)))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        first = generator.integers(0, n, size=(count, -(-n // block), 1))
        # Circular, so that the first and last samples are drawn as often as all others.
        drawn = ((first + np.arange(block)) % n).reshape(count, -1)[:, :n]
        values.append(statistic(np.median(data[:, drawn], axis=2)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(values), (tail, 1 - tail))
    value = float(statistic(np.median(data, axis=1)[:, None])[0])
    return Interval(value, min(float(low), value), max(float(high), value))
