"""Where the time goes, layer by layer: the dense file of a run beside its pruned one, by the runtime's own profile."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

import export
from diffprune.config import load_config
from diffprune.runfolder import require_files
from diffprune.tables import add_row, table
from export import NodeTime, Roofline, TimedLayer

CONVERTED = 0.8
"""A layer whose speed-up is less than this share of its MACs ratio is asked why."""

FIXED = 0.01
"""Milliseconds below which calling a layer costs about as much as computing it."""


@dataclass(frozen=True)
class Explained:
    """One layer before and after; `why` it did not get as much faster as it got smaller, empty if it did."""

    dense: TimedLayer
    pruned: TimedLayer
    roofline: float
    why: str

    @property
    def speedup(self) -> float:
        return self.dense.ms / self.pruned.ms


def explained(
    dense: Iterable[TimedLayer], pruned: Iterable[TimedLayer], roofline: Roofline, step: int
) -> list[Explained]:
    """Layers of both files whose weights have one name, in pairs, in the order in which they run in the dense one."""
    left = _called(pruned)
    return [
        Explained(layer, left[name], roofline.ms(left[name]) / left[name].ms, why(layer, left[name], roofline, step))
        for name, layer in _called(dense).items()
        if name in left
    ]


def why(dense: TimedLayer, small: TimedLayer, roofline: Roofline, step: int) -> str:
    """The reason for a speed-up below the MACs ratio."""
    if (dense.ms / small.ms) >= CONVERTED * dense.macs / small.macs:
        return ""
    if any(new % step and not old % step for new, old in zip(small.widths, dense.widths, strict=True)):
        return f"width off the step of {step}"
    if small.ms < FIXED:
        return "fixed cost of a call"
    if roofline.memory_bound(small):
        return "memory-bound"
    if min(small.widths) < 2 * step:
        return "too narrow to fill blocks"
    return "below the roofline"


def explain_lines(folder: Path, *, threads: int | None = None, batch: int | None = None) -> Iterator[Any]:
    """Lines and tables for a terminal, with the threads and images at once that the run was measured with, or others.

    Raises BadRun if the folder lacks one of the two files.
    """
    require_files(folder, ("dense.onnx", "pruned.onnx"))
    files, stored = (folder / "dense.onnx", folder / "pruned.onnx"), folder / "config.toml"
    config = load_config(stored) if stored.is_file() else None
    threads = threads or (config.threads if config else 1)
    batch = batch or (config.latency_batch if config else 1)
    (dense, dense_rest), (pruned, pruned_rest) = (
        export.layers_of(file, threads=threads, batch=batch) for file in files
    )
    if config and config.latency_device != "cpu":
        yield "this run asked a GPU to be fast; what follows is onnxruntime on this CPU"
        yield ""
    roofline, step = export.measure_roofline(threads=threads), export.default_step()
    rows = explained(dense, pruned, roofline, step)
    yield _pairs(rows)
    yield ""
    paired = {row.dense.weight for row in rows}
    if alone := [layer for layer in dense if layer.weight not in paired]:
        names = ", ".join(layer.weight.removesuffix(".weight") for layer in alone)
        ms = sum(layer.ms for layer in alone)
        yield f"{ms:.3f} ms of the dense file are in layers that the pruned one does not have: {names}"
        yield ""
    yield _others(dense_rest, pruned_rest)
    yield ""
    if pruned:
        best = sum(roofline.ms(layer) for layer in pruned) / sum(layer.ms for layer in pruned)
        yield (
            f"all layers of the pruned file run at {100 * best:.0f} % of the roofline: {2 * roofline.macs / 1e6:.0f} "
            f"GFLOP/s, {roofline.copies[0][1] / 1e6:.0f} GB/s in the caches and {roofline.copies[-1][1] / 1e6:.0f} "
            f"GB/s in memory, the fastest seen here with {threads} thread{'s' * (threads > 1)}"
        )
    yield "the fastest of 20 profiled runs each; for the speed-up itself see report.html or `diffprune bench`"


def _pairs(rows: Iterable[Explained]) -> Table:
    """A row for each layer of both files."""
    drawn = table("layer", "channels", "pruned to", "ms", "pruned", "faster", "MACs", "roofline", "", right=range(3, 8))
    for row in rows:
        add_row(
            drawn,
            row.dense.weight.removesuffix(".weight"),
            *(" > ".join(map(str, layer.widths)) for layer in (row.dense, row.pruned)),
            f"{row.dense.ms:.3f}",
            f"{row.pruned.ms:.3f}",
            f"{row.speedup:.2f}x",
            f"{row.dense.macs / row.pruned.macs:.2f}x",
            f"{100 * row.roofline:.0f} %",
            row.why,
        )
    return drawn


def _others(dense: Sequence[NodeTime], pruned: Sequence[NodeTime]) -> Table:
    """Everything but layers, by operator."""
    drawn = table("other operators", "ms", "pruned", right=range(1, 3))
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for side, nodes in enumerate((dense, pruned)):
        for node in nodes:
            sums[node.op][side] += node.ms
    for op, (before, after) in sorted(sums.items(), key=lambda entry: -entry[1][0]):
        add_row(drawn, op, f"{before:.3f}", f"{after:.3f}")
    return drawn


def _called(layers: Iterable[TimedLayer]) -> dict[tuple[str, int], TimedLayer]:
    """By the name of the weight, and which of its calls it is: a weight may serve several times."""
    seen: Counter[str] = Counter()
    found = {}
    for layer in layers:
        seen[layer.weight] += 1
        found[layer.weight, seen[layer.weight]] = layer
    return found
