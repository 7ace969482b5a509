"""What this CPU can do at best: multiply-adds of a large convolution, bytes of a large copy (Williams et al. 2009)."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from export.layers import LayerKind, TimedLayer, layers_of, side_by_side

BEST = LayerKind("Conv", (3, 3), (("pads", (1, 1, 1, 1)),), 1, (28, 28))
"""Its weights stay in the cache and its filters fill whole blocks: onnxruntime does nothing faster per multiply-add."""

WIDTHS = ((64, 64), (128, 128), (256, 256))
COPIED = 1 << 25
"""Bytes: more than the caches of a core hold."""

COPIES = 10


@dataclass(frozen=True)
class Roofline:
    """`macs` multiply-adds and `bytes` moved per millisecond, the fastest that was seen here with `threads` threads."""

    macs: float
    bytes: float
    threads: int

    def ms(self, layer: TimedLayer) -> float:
        """The least that a layer can take."""
        return max(layer.macs / self.macs, layer.bytes / self.bytes)

    def memory_bound(self, layer: TimedLayer) -> bool:
        """Moving its values takes longer than multiplying them."""
        return layer.bytes / self.bytes > layer.macs / self.macs


def measure_roofline(*, threads: int = 1) -> Roofline:
    """Takes about a second. A copy, by one thread, counts what is read and what is written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "best.onnx"
        onnx.save(side_by_side(BEST, WIDTHS, 1), str(path))
        layers, _ = layers_of(path, threads=threads)
    source, target = np.ones(COPIED, np.uint8), np.empty(COPIED, np.uint8)
    seconds = []
    for _ in range(COPIES):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return Roofline(max(layer.macs / layer.ms for layer in layers), 2 * COPIED / min(seconds) / 1e3, threads)
