"""The latency of a coupled network as a function of which units are open, from a table of measured layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import pad

from export import LayerKind, TimedLayer, Widths
from surgery import ChannelGraph, SizeModel

SHARES = tuple(eighths / 8 for eighths in range(1, 9))
"""Widths that are measured, as shares of the dense one, beside a single step: between them the table is linear."""

Axis = tuple[str, int]


@dataclass(frozen=True)
class Placed:
    """A measured layer in the channel graph."""

    timed: TimedLayer

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """The axes of the parameter that hold its channels in and out."""
        inside, outside = self.timed.axes
        return (self.timed.weight, inside), (self.timed.weight, outside)

    @property
    def groups(self) -> int:
        """How often its channels in lie side by side (grouped convolutions)."""
        return max(self.timed.kind.groups, 1)

    @property
    def values(self) -> tuple[float, float]:
        """Values read for each channel in, and written for each channel out."""
        kind, output = self.timed.kind, self.timed.output
        if kind.op == "MatMul":
            return float(kind.positions[0]), float(kind.positions[0])
        return float(output[0] * math.prod(kind.positions)), float(output[0] * math.prod(output[2:]))


@dataclass(frozen=True)
class Grid:
    """The widths of a layer that the table holds, in and out; where they are fixed, one alone."""

    inside: tuple[int, ...]
    outside: tuple[int, ...]

    def pairs(self, kind: LayerKind) -> list[Widths]:
        """What is measured; a depthwise convolution has as many channels out as in, or a multiple."""
        if kind.groups == 0:
            ratio = self.outside[-1] // self.inside[-1]
            return [(width, width * ratio) for width in self.inside]
        return [(a, b) for a in self.inside for b in self.outside]


class TimedSize(SizeModel):
    """A `SizeModel` that knows milliseconds, `latency`, on the machine and runtime that its table was measured with.

    Every layer costs what it does in the dense network (`TimedLayer.ms`), times the table at its widths over the table
    at the dense widths, linear between the widths measured. All other nodes together (pooling, additions, norms that
    were not folded) cost what they do there, in proportion to the values that layers read and write. The groups
    `drops` are residual branches of which, closed altogether, nothing is in the file.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        layers: Sequence[Placed],
        grids: Sequence[Grid],
        table: Mapping[tuple[LayerKind, Widths], float],
        rest_ms: float,
        drops: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    ) -> None:
        super().__init__(graph)
        self.layers, self.rest_ms, self.drops = layers, rest_ms, drops
        fixed: list[float] = []
        places = []
        for layer in layers:
            for axis, width in zip(layer.axes, layer.timed.widths, strict=True):
                places.append(self.axes.get(axis, len(self.axes) + 1 + len(fixed)))
                if axis not in self.axes:
                    fixed.append(float(width))
        self._place = torch.tensor(places, dtype=torch.long).view(-1, 2)
        self._never_cut = torch.tensor(fixed, dtype=torch.float64)
        groups = [[float(layer.groups) if layer.axes[0] in self.axes else 1.0, 1.0] for layer in layers]
        self._groups = torch.tensor(groups, dtype=torch.float64).view(-1, 2)
        self._values = torch.tensor([layer.values for layer in layers], dtype=torch.float64).view(-1, 2)
        longest = max(max(len(g.inside), len(g.outside)) for g in grids) + 2
        self._inside = torch.stack([_ends(g.inside, longest) for g in grids])
        self._outside = torch.stack([_ends(g.outside, longest) for g in grids])
        self._ms = torch.stack(
            [_surface(layer.timed, g, table, longest) for layer, g in zip(layers, grids, strict=True)]
        )
        self._whole = self.widths(torch.ones(self.units))

    def latency(self, open_: Tensor) -> Tensor:
        """Milliseconds for `open_`, shape (units,), values in [0, 1]. float64 scalar, differentiable."""
        widths = self.widths(open_.cpu())
        moved = (widths * self._values).sum() / (self._whole * self._values).sum()
        return self.per_layer(widths).sum() + self.rest_ms * moved

    def widths(self, open_: Tensor) -> Tensor:
        """Channels in and out of each layer, shape (layers, 2)."""
        return torch.cat((self.lengths(open_), self._never_cut))[self._place] * self._groups

    def per_layer(self, widths: Tensor) -> Tensor:
        """Milliseconds of each layer at `widths`, shape (layers,): bilinear in the table."""
        row, down = _between(self._inside, widths[:, 0])
        column, across = _between(self._outside, widths[:, 1])
        layer = torch.arange(len(widths))
        corners = [[self._ms[layer, row + i, column + j] for j in (0, 1)] for i in (0, 1)]
        low, high = (left + (right - left) * across for left, right in corners)
        return low + (high - low) * down


def _between(grid: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `grid` the place before its width, and how far on it lies to the next, 0 to 1 inside."""
    place = torch.searchsorted(grid, widths.detach()[:, None].contiguous(), right=True)[:, 0] - 1
    place = place.clamp(0, grid.shape[1] - 2)
    row = torch.arange(len(grid))
    start, end = grid[row, place], grid[row, place + 1]
    return place, (widths - start) / (end - start)


def _ends(points: Sequence[int], longest: int) -> Tensor:
    """Widths, made up to `longest` by ones that no layer has."""
    last = points[-1]
    return torch.tensor([0, *points, *range(last + 1, last + longest - len(points))], dtype=torch.float64)


def _surface(timed: TimedLayer, grid: Grid, table: Mapping[tuple[LayerKind, Widths], float], longest: int) -> Tensor:
    """Milliseconds at each pair of widths, shape (longest, longest); never less for more channels."""
    kind = timed.kind
    if kind.groups == 0:
        column = [[table[kind, pair]] for pair in grid.pairs(kind)]
        ms = torch.tensor(column, dtype=torch.float64).expand(-1, len(grid.outside))
    else:
        ms = torch.tensor([[table[kind, (a, b)] for b in grid.outside] for a in grid.inside], dtype=torch.float64)
    ms = ms.cummax(0).values.cummax(1).values
    ms = ms * timed.ms / ms[-1, -1]  # the dense one, which noise in a smaller one may have lifted
    ms = pad(ms, (1, 0, 1, 0))  # without channels no time
    rows, columns = ms.shape
    return pad(ms[None], (0, longest - columns, 0, longest - rows), mode="replicate")[0]
