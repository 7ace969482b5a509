"""Intervals against synthetic samples whose truth is known."""

import numpy as np
import pytest

from export.statistics import (
    SAMPLE_FLOORS,
    Interval,
    _resampled_medians,
    median_interval,
    quantile,
    ratio_interval,
    unsteadiness,
    widened,
)


def drifting(generator, n, strength=0.8):
    """Correlated, skewed factors (n,) around 1: the load of a machine, which lasts for some rounds."""
    noise = generator.standard_normal(n) * 0.05
    for index in range(1, n):
        noise[index] += strength * noise[index - 1]
    return np.exp(noise)


def pair(generator, n, ratio):
    load = drifting(generator, n)
    first, second = (load * np.exp(np.abs(generator.standard_normal(n)) * 0.02) for _ in range(2))
    return ratio * first, second


def test_a_known_ratio_of_two_is_found():
    for seed in range(10):
        dense, small = pair(np.random.default_rng(seed), 300, 2.0)
        found = ratio_interval(dense, small, seed=seed)
        assert found.value == pytest.approx(2, rel=0.03)
        assert found.low <= found.value <= found.high
        assert not found.contains(1)


def test_identical_pairs_are_covered_as_often_as_promised():
    """A 95 % interval must hold the truth in 95 of 100 trials; these, of medians in blocks, do in more."""
    trials = [pair(np.random.default_rng(seed), 150, 1.0) for seed in range(100)]
    held = [ratio_interval(*trial, seed=seed, resamples=400).contains(1) for seed, trial in enumerate(trials)]
    assert sum(held) >= 95


def test_pairs_cancel_the_load_that_they_share():
    dense, small = pair(np.random.default_rng(0), 400, 2.0)
    shuffled = np.random.default_rng(1).permutation(small)
    paired, unpaired = ratio_interval(dense, small, seed=0), ratio_interval(dense, shuffled, seed=0)
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)


def test_load_that_lasts_makes_less_certain():
    """The same samples in another order: neighbours that are alike count for less than independent ones."""
    widths = []
    for seed in range(10):
        lasting = drifting(np.random.default_rng(seed), 400)
        shuffled = np.random.default_rng(seed).permutation(lasting)
        widths.append([found.high - found.low for found in (median_interval(s, seed=0) for s in (lasting, shuffled))])
    lasting, independent = np.mean(widths, axis=0)
    assert lasting > 1.3 * independent


def test_swapping_the_two_inverts_the_ratio():
    dense, small = pair(np.random.default_rng(0), 200, 2.0)
    there, back = ratio_interval(dense, small, seed=0), ratio_interval(small, dense, seed=0)
    assert back.value == pytest.approx(1 / there.value)
    assert (back.low, back.high) == pytest.approx((1 / there.high, 1 / there.low), rel=1e-3)


def test_the_unit_does_not_matter_and_the_seed_repeats():
    samples = drifting(np.random.default_rng(0), 200)
    one, same, thousand = (median_interval(scale * samples, seed=3) for scale in (1, 1, 1000))
    assert one == same
    in_thousands = thousand.value / 1000, thousand.low / 1000, thousand.high / 1000
    assert in_thousands == pytest.approx((one.value, one.low, one.high))


@pytest.mark.parametrize("n", [1, 2, 7, 27, 100])
def test_counted_resamples_have_the_medians_of_drawn_ones(n):
    data = np.random.default_rng(n).integers(0, 20, size=(2, n)).astype(float)
    counted = _resampled_medians(data, 50, np.random.default_rng(1))
    block = int(np.ceil(n ** (1 / 3)))
    first = np.random.default_rng(1).integers(0, n, size=(50, -(-n // block)))
    drawn = ((first[..., None] + np.arange(block)) % n).reshape(50, -1)
    assert np.array_equal(counted, np.median(data[:, drawn], axis=2))


def test_equal_samples_are_certain():
    assert median_interval([2.0] * 50, seed=0) == Interval(2.0, 2.0, 2.0)


def test_a_control_that_is_off_widens_the_claim():
    claim = Interval(1.01, 1.005, 1.015)
    assert widened(claim, Interval(1.0, 1.0, 1.0)) == claim
    for control in (Interval(1.02, 1.01, 1.03), Interval(1 / 1.02, 1 / 1.03, 1 / 1.01)):
        wide = widened(claim, control)
        assert (wide.value, wide.low, wide.high) == pytest.approx((1.01, 1.005 / 1.03, 1.015 * 1.03))
        assert wide.contains(1)


@pytest.mark.parametrize(("share", "floor"), [(0.9, 64), (0.95, 130), (0.97, 219), (0.99, 662)])
def test_a_quantile_needs_enough_samples(share, floor):
    samples = np.arange(floor, dtype=float)
    assert quantile(samples, share) == pytest.approx(share * (floor - 1))
    assert quantile(samples[1:], share) is None


def test_the_floors_are_the_binomial_ones():
    """The smallest n of which at least two lie beyond the quantile with a chance of 99 %."""

    def at_most_one_beyond(n, share):
        return share**n + n * (1 - share) * share ** (n - 1)

    for share, floor in SAMPLE_FLOORS.items():
        assert at_most_one_beyond(floor, share) <= 0.01 < at_most_one_beyond(floor - 1, share)


def test_unsteadiness_sees_drift_and_forgives_outliers():
    samples = np.ones(200)
    samples[::20] = 50
    assert unsteadiness(samples) == 0
    assert unsteadiness(np.linspace(1, 2, 200)) > 0.1
    assert unsteadiness([1.0, 1.0, 1.0]) == 0


def test_impossible_series_are_refused():
    with pytest.raises(ValueError, match=r"got lengths \[2, 3\]"):
        ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0], seed=0)
    with pytest.raises(ValueError, match=r"got lengths \[0\]"):
        median_interval([], seed=0)
    with pytest.raises(ValueError, match=r"quantile 0\.5 asked"):
        quantile([1.0], 0.5)
