"""Interleaving, on a clock that only the candidates move."""

import numpy as np
import pytest

import export
from export.rounds import MIN_ROUNDS, MIN_ROUNDS_SLOW, PATIENCE, WARM_UP_RUNS, run_rounds


class Stopwatch:
    """A clock in nanoseconds, and candidates that take a given time on it and write down that they ran."""

    def __init__(self):
        self.now = 0
        self.runs = []

    def __call__(self):
        return self.now

    def candidate(self, name, milliseconds):
        def run():
            self.now += round(milliseconds * 1e6)
            self.runs.append(name)

        return run


def timed(*milliseconds, seconds, seed=0):
    watch = Stopwatch()
    candidates = [watch.candidate(name, cost) for name, cost in enumerate(milliseconds)]
    return run_rounds(candidates, seconds=seconds, seed=seed, clock=watch), watch


def test_each_candidate_gets_its_own_time():
    rounds, _ = timed(4.0, 2.0, seconds=3)
    assert rounds.milliseconds.shape == (2, rounds.count)
    assert np.allclose(rounds.milliseconds, [[4.0], [2.0]])


def test_every_round_runs_every_candidate_once_in_changing_order():
    rounds, watch = timed(1.0, 1.0, 1.0, seconds=0.9)
    measured = watch.runs[-3 * rounds.count :]
    orders = [tuple(measured[start : start + 3]) for start in range(0, len(measured), 3)]
    assert {tuple(sorted(order)) for order in orders} == {(0, 1, 2)}
    assert len(set(orders)) == 6


def test_candidates_are_warmed_up_by_runs_and_by_time(monkeypatch):
    monkeypatch.setattr(export.rounds, "WARM_UP_SECONDS", 0.2)  # as it is outside of tests
    rounds, watch = timed(1000.0, 1.0, seconds=1)
    assert watch.runs.count(0) - rounds.count == WARM_UP_RUNS
    assert watch.runs.count(1) - rounds.count == 200


def test_the_time_asked_for_is_used():
    rounds, _ = timed(1.0, 3.0, seconds=2)
    assert rounds.count == 500
    assert rounds.count >= MIN_ROUNDS


def test_there_are_enough_rounds_even_if_that_takes_longer():
    assert timed(10.0, seconds=0.5)[0].count == MIN_ROUNDS


def test_slow_candidates_get_fewer_rounds_and_say_so():
    rounds, _ = timed(1000.0, seconds=1)
    assert rounds.count == MIN_ROUNDS_SLOW < MIN_ROUNDS
    assert timed(100.0, seconds=2)[0].count == PATIENCE * 2 * 10


def test_fast_candidates_run_several_times_per_sample():
    rounds, _ = timed(0.03, 0.5, seconds=0.2)
    assert rounds.runs_per_sample == (7, 1)
    assert np.allclose(rounds.milliseconds, [[0.03], [0.5]])


def test_the_seed_decides_the_order():
    first, again, other = (timed(1.0, 1.0, seconds=0.3, seed=seed)[1].runs for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("seconds", [-1, 0, float("inf"), float("nan")])
def test_no_time_and_time_without_an_end_are_refused(seconds):
    with pytest.raises(export.CannotMeasure, match=f"{seconds} seconds asked"):
        timed(1.0, seconds=seconds)


def test_a_timer_of_its_own_takes_the_samples():
    """What takes 3 ms of a GPU takes 1 ms of this clock, in which the work is only queued."""
    watch = Stopwatch()
    timed = []

    def timer(run, repeats):
        timed.append(repeats)
        run()
        return 3.0

    rounds = run_rounds([watch.candidate("a", 0.03)], seconds=0.01, seed=0, clock=watch, timer=timer)
    assert np.all(rounds.milliseconds == 3)
    assert timed[-rounds.count :] == [7] * rounds.count
    assert set(timed[: -rounds.count]) == {1}


def test_the_share_of_the_time_that_samples_account_for_is_told():
    assert timed(1.0, 3.0, seconds=2)[0].busy == pytest.approx(1.0)
    watch = Stopwatch()
    half = run_rounds(
        [watch.candidate("a", 1.0)], seconds=1, seed=0, clock=watch, timer=lambda run, repeats: (run(), 0.5)[1]
    )
    assert half.busy == pytest.approx(0.5)
