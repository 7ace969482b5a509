"""The clock that samples are taken by: that of the wall, of the core, or of a GPU."""

import time
from dataclasses import dataclass
from functools import cache

import torch

from export.rounds import Run, Timer, wall_timer
from export.settings import Settings

FINE_NS = 50_000
"""The coarsest tick of a thread's own time that samples may be taken by: some systems count it in milliseconds."""


@dataclass(frozen=True)
class Clock:
    """`name` is "wall", "core" or "cuda events"; `timer` takes samples by it."""

    name: str
    timer: Timer


def clock_for(settings: Settings) -> Clock:
    """What tells most of a network and least of the rest of the machine.

    A single thread on a CPU is timed by the core: the time in which it had one. What others do in between while it
    waits for its turn is not counted; on a quiet machine there is none, and both clocks agree. With a process that
    computes on each core, the wall clock was off by up to 55 % in a ratio of medians, that of the core by as much as
    without (docs/latency.md). Several threads wait for each other, so theirs is the wall clock. torch on a GPU has
    CUDA events.
    """
    if settings.device == "cuda":
        return WALL if settings.runtime == "onnx" else Clock("cuda events", event_timer)
    return Clock("core", core_timer) if settings.threads == 1 and _core_is_fine() else WALL


def core_timer(run: Run, repeats: int) -> float:
    """Milliseconds of a run for which the calling thread had a core."""
    start = time.thread_time_ns()
    for _ in range(repeats):
        run()
    return (time.thread_time_ns() - start) / 1e6 / repeats


def event_timer(run: Run, repeats: int) -> float:
    """Milliseconds of a run on the GPU, from an idle GPU on: each one ends before the next begins."""
    total = 0.0
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        total += start.elapsed_time(end)
    return total / repeats


@cache
def _core_is_fine() -> bool:
    """The time of a thread passes in ticks of at most FINE_NS. One tick tells: a busy host stretches others."""
    until = time.monotonic() + 0.1
    before = time.thread_time_ns()
    while time.monotonic() < until:
        now = time.thread_time_ns()
        if 0 < now - before <= FINE_NS:
            return True
        before = now
    return False


WALL = Clock("wall", wall_timer)
