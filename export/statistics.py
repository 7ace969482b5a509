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
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK // data.size)
    parts = [min(step, resamples - start) for start in range(0, resamples, step)]
    values = [statistic(_resampled_medians(data, count, generator)) for count in parts]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(values), (tail, 1 - tail))
    value = float(statistic(np.median(data, axis=1)[:, None])[0])
    return Interval(value, min(float(low), value), max(float(high), value))


def _resampled_medians(
    data: npt.NDArray[np.float64], count: int, generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Medians of `count` resamples of `data`, shape (series, n), as (series, count).

    A resample is how often it holds each sample: counted along the sorted samples, that gives the median in a third of
    the time that drawing and partitioning takes. Blocks are whole, and circular, so that the first and last samples are
    drawn as often as all others.
    """
    n = data.shape[1]
    block = int(np.ceil(n ** (1 / 3)))  # the usual rate: grows with n, but more slowly than the number of blocks
    first = generator.integers(0, n, size=(count, -(-n // block)))
    begun = np.stack([np.bincount(row, minlength=n) for row in first]).astype(np.int32)
    sums = np.concatenate((begun[:, n - block :], begun), axis=1).cumsum(axis=1, dtype=np.int32)
    held = sums[:, block:] - sums[:, :-block]
    length = first.shape[1] * block
    medians = []
    for one in data:
        order = one.argsort(kind="stable")
        up_to = held[:, order].cumsum(axis=1, dtype=np.int32)
        middle = [one[order[(up_to > rank).argmax(axis=1)]] for rank in ((length - 1) // 2, length // 2)]
        medians.append((middle[0] + middle[1]) / 2)
    return np.array(medians)
