"""What `diffprune bench` shows: medians with their intervals, and which of two files is faster."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import export
from diffprune.report import count, milliseconds
from diffprune.tables import add_row, table
from diffprune.verdict import speed_in_words as in_words


def bench_lines(files: tuple[Path, ...], result: export.Latency | export.Comparison) -> Iterator[Any]:
    """Lines and a table for a terminal; `files` is one file that was measured, or two that were compared."""
    rows = (result.dense, result.small) if isinstance(result, export.Comparison) else (result,)
    drawn = table("file", "median", "95 % interval", "p90", "runs", right=range(1, 5))
    for file, row in zip(files, rows, strict=True):
        interval = f"{row.low:#.3g} to {milliseconds(row.high)}"
        p90 = "\N{EN DASH}" if row.p90 is None else milliseconds(row.p90)
        runs = count(len(row.samples) * row.runs_per_sample)
        add_row(drawn, str(file), milliseconds(row.median), interval, p90, runs)
    yield drawn
    yield ""
    if isinstance(result, export.Comparison):
        yield f"{files[1].name}, compared with {files[0].name}, is {in_words(result.speedup, result.low, result.high)}"
    first = rows[0]
    yield f"{first.device}, batch {first.batch}, threads {first.threads}; {first.machine}"
    yield from (f"warning: {text}" for text in dict.fromkeys(result.warnings))
