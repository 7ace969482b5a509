"""Building a `TimedSize`: where the dense network spends its time, and each of its layers at many widths."""

from collections import defaultdict, deque
from collections.abc import Callable
from math import ceil
from pathlib import Path

from torch import nn

import export
from diffprune.bundles import leading_to
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
    """The layers that are in the graph, and the others.

    Weights keep their names in the file, but for those of matrix products, which are transposed and renamed: they are
    found by their shape, in the order in which layers run.
    """
    renamed: dict[Widths, deque[str]] = defaultdict(deque)
    named = {layer.weight for layer in layers}
    for layer in graph.layers:
        shape = graph.shapes.get(layer.weight, ())
        if len(shape) == 2 and layer.weight not in named:
            renamed[shape[1], shape[0]].append(layer.weight)
    placed, strangers = [], []
    for timed in layers:
        waiting = renamed[timed.widths] if timed.kind.op == "MatMul" and timed.weight not in graph.shapes else None
        weight = waiting.popleft() if waiting else timed.weight
        if weight in graph.shapes:
            placed.append(Placed(timed, _axes(timed, weight), max(timed.kind.groups, 1)))
        else:
            strangers.append(timed)
    return placed, strangers


def _axes(timed: TimedLayer, weight: str) -> tuple[Axis, Axis]:
    """Where torch keeps the channels in and out; a depthwise convolution has both on one axis."""
    if timed.kind.groups == 0:
        return (weight, 0), (weight, 0)
    return ((weight, 0), (weight, 1)) if timed.kind.op == "ConvTranspose" else ((weight, 1), (weight, 0))


def _grid(layer: Placed, axes: dict[Axis, int], step: int) -> Grid:
    def points(width: int, axis: Axis, groups: int) -> tuple[int, ...]:
        if axis not in axes:
            return (width,)
        unit = step * groups
        return tuple(sorted({min(ceil(width * share / unit) * unit, width) for share in (1e-9, *SHARES)}))

    inside, outside = layer.timed.widths
    return Grid(points(inside, layer.axes[0], layer.groups), points(outside, layer.axes[1], layer.groups))
