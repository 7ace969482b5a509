"""Which clock takes a sample, and what it counts."""

import time

import pytest

import export
from export import clocks
from export.clocks import clock_for, core_timer
from export.rounds import wall_timer
from export.settings import Settings


def waiting():
    time.sleep(0.05)


def test_the_core_s_clock_does_not_count_waiting():
    assert core_timer(waiting, 2) < 25 < 50 <= wall_timer(waiting, 2)


def test_the_core_s_clock_counts_computing():
    def computing():
        until = time.thread_time_ns() + 5_000_000
        while time.thread_time_ns() < until:
            pass

    assert 5 <= core_timer(computing, 3) <= wall_timer(computing, 3) * 1.5


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (Settings("cpu", 1, 8, 0), "core"),
        (Settings("cpu", 1, 1, 0, "eager"), "core"),
        (Settings("cpu", 2, 1, 0), "wall"),
        (Settings("cuda", 1, 1, 0), "wall"),
        (Settings("cuda", 1, 1, 0, "cuda-graph"), "cuda events"),
    ],
)
def test_one_thread_is_timed_by_the_core_and_torch_on_a_gpu_by_events(monkeypatch, settings, name):
    monkeypatch.setattr(clocks, "_core_is_fine", lambda: True)
    assert clock_for(settings).name == name


@pytest.mark.parametrize(("tick", "fine"), [(1_000, True), (10_000_000, False), (None, False)])
def test_a_system_that_counts_in_coarse_ticks_is_timed_by_the_wall(monkeypatch, tick, fine):
    now = [0]

    def coarse():
        now[0] += 100
        return 0 if tick is None else now[0] // tick * tick

    monkeypatch.setattr(clocks.time, "thread_time_ns", coarse)
    assert clocks._core_is_fine.__wrapped__() is fine


def test_a_tick_that_the_host_stretched_does_not_speak_for_the_system(monkeypatch):
    times = iter([0, 3_000_000, 3_001_000])
    monkeypatch.setattr(clocks.time, "thread_time_ns", lambda: next(times))
    assert clocks._core_is_fine.__wrapped__()


def test_a_latency_names_its_clock(files):
    one = clock_for(Settings("cpu", 1, 1, 0)).name
    assert export.measure(files["small"].path, seconds=0.1).as_dict()["clock"] == one
    assert export.measure(files["small"].path, threads=2, seconds=0.1).clock == "wall"
