"""Building a `TimedSize`: where the dense network spends its time, and each of its layers at many widths."""

from collections import defaultdict
from collections.abc import Callable
from math import ceil
from pathlib import Path

from torch import nn

import export
from diffprune.bundles import leading_to
from diffprune.errors import BadBudget
from diffprune.timed import SHARES, Axis, Grid, Placed, TimedSize
from export import LayerKind, Settings, TimedLayer, Widths
from export.settings import ONE_THREAD
from surgery import ChannelGraph, SizeModel

Progress = Callable[[int, int], None]


def timed_file(
    dense: Path,
    graph: ChannelGraph,
    *,
    step: int,
    settings: Settings = ONE_THREAD,
    on_progress: Progress = lambda done, all_: None,
) -> TimedSize:
    """What images take in onnxruntime, in what may be cut from the network in the file `dense`, by its profile.

    Widths are measured at multiples of `step`. The file must be `export.to_onnx` of the network of `graph`. Layers that
    are not found in the graph count among the rest. Measurements are remembered (`export.cache_folder`).
    """
    layers, others = export.layers_of(dense, threads=settings.threads, batch=settings.batch)
    placed, strangers = _placed(layers, graph)
    rest = sum(node.ms for node in others) + sum(layer.ms for layer in strangers)
    return _timed(placed, rest, graph, step, settings, on_progress, _drops(placed, graph, export.ending_in_sums(dense)))


def timed_network(
    model: nn.Module,
    example: export.Examples,
    graph: ChannelGraph,
    *,
    step: int,
    settings: Settings,
    on_progress: Progress = lambda done, all_: None,
) -> TimedSize:
    """The same in torch, where no branch can be left out."""
    layers, rest = export.network_layers(model, example, settings)
    placed, strangers = _placed(layers, graph)
    rest += sum(layer.ms for layer in strangers)
    return _timed(placed, rest, graph, step, settings, on_progress, {})


def _timed(
    placed: list[Placed],
    rest: float,
    graph: ChannelGraph,
    step: int,
    settings: Settings,
    on_progress: Progress,
    drops: dict[str, tuple[str, ...]],
) -> TimedSize:
    if not placed:
        raise BadBudget(
            "no layer of the network was found among those whose time is known", at="Budget(speedup=)",
            effect="nothing was started", fix="ask for a share of the macs or params",
        )
    axes = SizeModel(graph).axes
    grids = [_grid(layer, axes, step) for layer in placed]
    wanted: dict[LayerKind, list[Widths]] = defaultdict(list)
    for layer, grid in zip(placed, grids, strict=True):
        wanted[layer.timed.kind] += grid.pairs(layer.timed.kind)
    table = export.layer_table(wanted, settings, on_progress=on_progress)
    return TimedSize(graph, placed, grids, table, rest, drops)


def _drops(placed: list[Placed], graph: ChannelGraph, ending: set[str]) -> dict[str, tuple[str, ...]]:
    """Groups that may be closed altogether, of which the file then has nothing: all that reads them ends in a sum.

    With each the groups that lead nowhere else, and so go with it.
    """
    free = {layer.axes[0][0] for layer in placed if layer.timed.weight in ending}
    last = [g for g in graph.groups if g.droppable and {slot.tensor for slot in g.readers} <= free]
    return {group.name: tuple(other.name for other in leading_to(group, graph)) for group in last}


def _placed(layers: list[TimedLayer], graph: ChannelGraph) -> tuple[list[Placed], list[TimedLayer]]:
    """The layers whose weight is a parameter of the graph, and the others."""
    return (
        [Placed(layer) for layer in layers if layer.weight in graph.shapes],
        [layer for layer in layers if layer.weight not in graph.shapes],
    )


def _grid(layer: Placed, axes: dict[Axis, int], step: int) -> Grid:
    def points(width: int, axis: Axis, groups: int) -> tuple[int, ...]:
        if axis not in axes:
            return (width,)
        unit = step * groups
        return tuple(sorted({min(ceil(width * share / unit) * unit, width) for share in (1e-9, *SHARES)}))

    inside, outside = layer.timed.widths
    return Grid(points(inside, layer.axes[0], layer.groups), points(outside, layer.axes[1], layer.groups))
