"""How far answers are from others that they should equal."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def worst(found: Sequence[Array], reference: Sequence[Array], tolerance: float) -> tuple[float, float, float, float]:
    """`distance`, the worst of all outputs; NaN is worse than any number."""
    pairs = zip(found, reference, strict=True)
    rows = [distance(a.astype(np.float64), b.astype(np.float64), tolerance) for a, b in pairs]
    largest, relative, agreement, sqnr = np.array(rows).T
    return float(largest.max()), float(relative.max()), float(agreement.min()), float(sqnr.min())


def distance(found: Array, reference: Array, tolerance: float) -> tuple[float, float, float, float]:
    """max |d|, max |d| / max |reference|, top-1 agreement over axis 1, SQNR in dB, of one output (batch, ...)."""
    if reference.size == 0:
        return 0.0, 0.0, 1.0, math.inf
    difference = np.abs(found - reference)
    scale = float(np.abs(reference).max())
    largest = float(difference.max())
    relative = largest / scale if scale > 0 else (0.0 if largest == 0 else math.inf)
    agreement = 1.0
    if reference.ndim >= 2:
        chosen = np.take_along_axis(reference, found.argmax(axis=1, keepdims=True), axis=1)
        agreement = float((reference.max(axis=1, keepdims=True) - chosen <= tolerance * scale).mean())
    signal, noise = max(float((reference**2).sum()), 1e-300), float((difference**2).sum())
    with np.errstate(divide="ignore"):  # infinite without noise, and below zero with infinite noise
        sqnr = 10 * float(np.log10(np.divide(signal, noise)))
    return largest, relative, agreement, sqnr
