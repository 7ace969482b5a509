"""At which channel multiple does a convolution step in cost here?

onnxruntime computes convolutions on the CPU in blocks of channels, a GPU in tiles: a width between two multiples of the
block costs as much as the next multiple. The block depends on the instruction set or the card, so it is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from export.machine import instruction_sets

CANDIDATES = (4, 8, 16, 32)
# The first width below 64 that costs less is 60 at a step of 4, 56 at 8, 48 at 16 and 32 at 32. 63 is for the record:
# not a multiple of 4, it leaves the blocked path and is slower than 64.
WIDTHS = (64, 63, 60, 56, 52, 48, 32)
DECISIVE = (64, 60, 56, 52, 48, 32)
# How far the falls from width to width may lie from those of a staircase, as a share of the whole fall; another step's
# lie 0.5 and more away.
GOOD_FIT = 0.3
CLEAR_LEAD = 1.5


@dataclass(frozen=True)
class Step:
    """Keep widths at multiples of `multiple`, rounding up. `evidence` is milliseconds per width.

    `source` is "probe" when the measurement decided, "instruction set" or, on a GPU, "tensor cores" when it was
    inconclusive. `misfit` holds, per candidate, how far the measured falls lie from its own, see `decide`; nothing
    where narrow layers cost no less than wide ones.
    """

    multiple: int
    evidence: Mapping[int, float]
    misfit: Mapping[int, float]
    source: Literal["probe", "instruction set", "tensor cores"]

    @property
    def doubt(self) -> str | None:
        """A sentence where the measurement did not decide."""
        if self.source == "probe":
            return None
        return (
            f"which widths are fast here could not be measured clearly, so multiples of {self.multiple} are taken, by "
            f"the {self.source}: stop other work and try again, or give round_to"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, whose keys are strings."""
        return {
            "multiple": self.multiple, "source": self.source,
            "evidence": {str(width): cost for width, cost in self.evidence.items()},
            "misfit": {str(multiple): error for multiple, error in self.misfit.items()},
        }


def default_step() -> int:
    """The step of this CPU by instruction set alone, without measuring: 16 with AVX-512, 8 otherwise."""
    return 16 if "avx512f" in instruction_sets() else 8


def decide(
    evidence: Mapping[int, float],
    scale: int = 1,
    otherwise: int | None = None,
    source: Literal["instruction set", "tensor cores"] = "instruction set",
) -> Step:
    """The candidate whose staircase fits best: cost(C) ~ (s * ceil(C / s))^p for a layer with C channels in and out.

    What tells is where log cost(C) falls between neighbouring widths, from 64 down to 48, over what a smooth law would
    fall there by the costs of 64 and 32, so that p need not be known. The distance to the falls of the best candidate
    has to be small, and clearly smaller than that of the others; else it is `otherwise`, by default `default_step()`.
    Widths and candidates are `scale` times those of this module.
    """
    widths, candidates = ([scale * number for number in numbers] for numbers in (DECISIVE, CANDIDATES))
    costs = [evidence[width] for width in widths]
    misfit = {}
    if costs[0] > costs[-1]:
        found = _falls(widths, costs)
        for multiple in candidates:
            padded = [-(-width // multiple) * multiple for width in widths]
            misfit[multiple] = float(np.linalg.norm(found - _falls(widths, padded)))
        first, second = sorted(candidates, key=misfit.__getitem__)[:2]
        if misfit[first] <= GOOD_FIT and misfit[second] >= CLEAR_LEAD * misfit[first]:
            return Step(first, dict(evidence), misfit, "probe")
    return Step(otherwise or default_step(), dict(evidence), misfit, source)


def _falls(widths: Sequence[int], costs: Sequence[float]) -> npt.NDArray[np.float64]:
    """Of the logarithm of `costs` from each of the `widths` but the last to the next, over a smooth law's fall."""
    log, width = np.log(costs), np.log(widths)
    smooth = (log[0] - log[-1]) * (width[0] - width[-2]) / (width[0] - width[-1])
    return np.asarray(-np.diff(log[:-1]) / smooth)
