"""What a layer is to a table of latencies: its kind, and its widths."""

import math
from dataclasses import dataclass

Widths = tuple[int, int]
"""Channels in and out of a layer."""


@dataclass(frozen=True)
class LayerKind:
    """A layer but for its widths: `positions` is the input without batch and channels, `groups` 0 if depthwise.

    Of a matrix product `positions` is the number of rows, those of the whole batch. `attributes` are ONNX's: strides,
    pads, dilations and the like.
    """

    op: str
    kernel: tuple[int, ...]
    attributes: tuple[tuple[str, tuple[int, ...]], ...]
    groups: int
    positions: tuple[int, ...]

    def entry(self, widths: Widths) -> str:
        """The name of a measurement."""
        details = "".join(f" {name}={'x'.join(map(str, values))}" for name, values in self.attributes)
        at = "x".join(map(str, self.positions)) or "1"
        kernel = "x".join(map(str, self.kernel)) or "1"
        return f"{self.op} {kernel} groups={self.groups or 'depthwise'} on {at}{details}: {widths[0]} to {widths[1]}"


@dataclass(frozen=True)
class TimedLayer:
    """A layer of a file or a network: kind, widths, the name of its weight, the shape it writes, milliseconds there.

    `raw` is a matrix product whose weight is (in, out) in the network, as no nn.Linear has it.
    """

    kind: LayerKind
    widths: Widths
    weight: str
    output: tuple[int, ...]
    ms: float
    raw: bool = False

    @property
    def axes(self) -> tuple[int, int]:
        """Where the network's weight keeps the channels in and out; a depthwise convolution has both on one axis."""
        if self.kind.groups == 0:
            return 0, 0
        return (0, 1) if self.raw or self.kind.op == "ConvTranspose" else (1, 0)

    @property
    def macs(self) -> int:
        """Multiply-adds of one run: each weight once at every place that is written (ConvTranspose: read)."""
        places = self.output[2:] if self.kind.op == "Conv" else self.kind.positions
        return self._batch * math.prod(places) * self._weights

    @property
    def bytes(self) -> int:
        """What one run must at least read and write, in float32: input, weight and output."""
        read = self._batch * self.widths[0] * math.prod(self.kind.positions)
        return 4 * (read + self._weights + math.prod(self.output))

    @property
    def _batch(self) -> int:
        return 1 if self.kind.op == "MatMul" else self.output[0]  # whose positions count the whole batch

    @property
    def _weights(self) -> int:
        return math.prod(weight_shape(self.kind, self.widths))


def weight_shape(kind: LayerKind, widths: Widths) -> tuple[int, ...]:
    """Of the weight of a layer, as ONNX and torch have it but for matrix products, which torch transposes."""
    inside, outside = widths
    if kind.op == "MatMul":
        return widths
    groups = kind.groups or inside
    return (*((outside, inside // groups) if kind.op == "Conv" else (inside, outside // groups)), *kind.kernel)
