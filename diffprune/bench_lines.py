"""What `diffprune bench` shows: medians with their intervals, which of two is faster, and what that holds for."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

import export
from diffprune.benching import Bench, Result, in_words
from diffprune.report import count, figures, milliseconds
from diffprune.tables import add_row, table
from diffprune.verdict import speed_in_words
from export.settings import Settings


def bench_lines(bench: Bench) -> Iterator[Any]:
    """Lines and a table for a terminal."""
    pairs = [result for result in bench.results if isinstance(result, export.Comparison)]
    varying = [key for key in asdict(bench.settings[0]) if len({asdict(s)[key] for s in bench.settings}) > 1]
    if varying:
        yield " against ".join(bench.names)
    yield _speedups(bench.settings, pairs, varying) if varying and pairs else _latencies(bench, varying)
    yield ""
    if pairs and not varying:
        (pair,), short = pairs, [name.rpartition("/")[2] for name in bench.names]
        dense, small = bench.names if short[0] == short[1] else short
        yield f"{small}, compared with {dense}, is {speed_in_words(pair.speedup, pair.low, pair.high)}"
    held = " against ".join(dict.fromkeys(row.precision for row in _latencies_of(bench.results[0])))
    constant = {**asdict(bench.settings[0]), "precision": held}
    constant = {key: value for key, value in constant.items() if key not in varying}
    yield f"{in_words(constant)}; {bench.results[0].machine}"
    clocks = {row.clock for result in bench.results for row in _latencies_of(result)}
    if "core" in clocks:
        yield f"{'one thread is ' * (len(clocks) > 1)}timed by the core: when others had it is not counted"
    if len(clocks) > 1:
        yield "warning: the core and the wall agree on a quiet machine only: compare within one of them"
    inputs = [spec for result in bench.results for spec in _latencies_of(result)[0].inputs]
    yield from dict.fromkeys(f"fed: {spec}, {spec.values}" for spec in inputs)
    for setting, result in zip(bench.settings, bench.results, strict=True):
        where = in_words({key: asdict(setting)[key] for key in varying})
        one_line = [f"{where}: {'; '.join(result.warnings)}"] if varying and result.warnings else result.warnings
        yield from (f"warning: {text}" for text in one_line)


def _latencies(bench: Bench, varying: list[str]) -> Table:
    """A row for each setting of a file, or under one setting for each network."""
    head = varying or ["file"]
    drawn = table(*head, "median", "95 % interval", "p90", "p99", "runs", right=range(1, 5 + len(head)))
    for setting, result in zip(bench.settings, bench.results, strict=True):
        for name, row in zip(bench.names, _latencies_of(result), strict=True):
            interval = f"{figures(row.low)} to {milliseconds(row.high)}"
            quantiles = ["\N{EN DASH}" if value is None else milliseconds(value) for value in (row.p90, row.p99)]
            where = [str(asdict(setting)[key]) for key in varying] or [name]
            runs = count(len(row.samples) * row.runs_per_sample)
            add_row(drawn, *where, milliseconds(row.median), interval, *quantiles, runs)
    return drawn


def _speedups(settings: tuple[Settings, ...], pairs: list[export.Comparison], varying: list[str]) -> Table:
    """A row for each setting."""
    drawn = table(*varying, "dense", "small", "small is", right=range(len(varying) + 2))
    for setting, pair in zip(settings, pairs, strict=True):
        where = [str(asdict(setting)[key]) for key in varying]
        medians = milliseconds(pair.dense.median), milliseconds(pair.small.median)
        add_row(drawn, *where, *medians, speed_in_words(pair.speedup, pair.low, pair.high))
    return drawn


def _latencies_of(result: Result) -> tuple[export.Latency, ...]:
    return (result.dense, result.small) if isinstance(result, export.Comparison) else (result,)
