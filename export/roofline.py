"""What this CPU can do at best: multiply-adds of a large convolution, bytes of a copy (Williams et al. 2009)."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from export.layer_kinds import LayerKind, TimedLayer
from export.layers import layers_of, side_by_side
from export.networks import torch_as_asked
from export.settings import Settings

BEST = LayerKind("Conv", (3, 3), (("pads", (1, 1, 1, 1)),), 1, (28, 28))
"""Its weights stay in the cache and its filters fill whole blocks: onnxruntime does nothing faster per multiply-add."""

WIDTHS = ((64, 64), (128, 128), (256, 256))
MOVED = tuple(1 << bits for bits in range(18, 27))
"""Bytes that copies read and write together, 256 KiB to 64 MiB: from within a cache to more than a core's caches hold.
Smaller ones are mostly the call."""

COPIES = 30


@dataclass(frozen=True)
class Roofline:
    """`macs` multiply-adds per millisecond, and `copies`: bytes moved, and how many per millisecond, smallest first.

    The fastest that was seen here with `threads` threads. What a layer reads was just written by the one before it: as
    long as a cache holds it, it moves several times as fast as from memory.
    """

    macs: float
    copies: tuple[tuple[int, float], ...]
    threads: int

    def rate(self, moved: float) -> float:
        """Bytes per millisecond where so many are moved in all: those of the next larger copy."""
        return next((rate for size, rate in self.copies if size >= moved), self.copies[-1][1])

    def ms(self, layer: TimedLayer) -> float:
        """The least that a layer can take."""
        return max(layer.macs / self.macs, layer.bytes / self.rate(layer.bytes))

    def memory_bound(self, layer: TimedLayer) -> bool:
        """Moving its values takes longer than multiplying them."""
        return layer.bytes / self.rate(layer.bytes) > layer.macs / self.macs


def measure_roofline(*, threads: int = 1) -> Roofline:
    """Takes about a second. A copy counts what is read and what is written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "best.onnx"
        onnx.save(side_by_side(BEST, WIDTHS, 1), str(path))
        layers, _ = layers_of(path, threads=threads)
    with torch_as_asked(Settings("cpu", threads, 1, 0, "eager")):
        rates = [_rate(moved) for moved in MOVED]
    fastest = [max(rates[place:]) for place in range(len(rates))]  # less cannot be slower: then others were at work
    return Roofline(max(layer.macs / layer.ms for layer in layers), tuple(zip(MOVED, fastest, strict=True)), threads)


def _rate(moved: int) -> float:
    """Bytes per millisecond of the fastest of COPIES copies that move so many."""
    source, target = (torch.ones(moved // 2, dtype=torch.uint8) for _ in range(2))
    seconds = []
    for _ in range(COPIES):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return moved / min(seconds) / 1e3
