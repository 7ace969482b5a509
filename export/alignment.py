"""At which channel multiple does a convolution step in cost here?

onnxruntime computes convolutions on the CPU in blocks of channels, a GPU in tiles: a width between two multiples of the
block costs as much as the next multiple. The block depends on the instruction set or the card, so it is measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from export.machine import instruction_sets

CANDIDATES = (4, 8, 16, 32)
# The first width below 64 that costs less is 60 at a step of 4, 56 at 8, 48 at 16 and 32 at 32. 63 is for the record:
# not a multiple of 4, it leaves the blocked path and is slower than 64.
WIDTHS = (64, 63, 60, 56, 52, 48, 32)
DECISIVE = (64, 60, 56, 52, 48, 32)
# A staircase explains costs to within some percent; another block size misses by 10 % to 30 %.
GOOD_FIT = 0.12
CLEAR_LEAD = 1.5


@dataclass(frozen=True)
class Step:
    """Keep widths at multiples of `multiple`, rounding up. `evidence` is milliseconds per width.

    `source` is "probe" when the measurement decided, "instruction set" or, on a GPU, "tensor cores" when it was
    inconclusive. `misfit` holds, per candidate, the standard deviation of log(measured / predicted).
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
    """The candidate whose staircase fits best: cost(C) ~ (s * ceil(C / s))^2 for a layer with C channels in and out.

    It has to fit well, and clearly better than the others; else it is `otherwise`, by default `default_step()`. Widths
    and candidates are `scale` times those of this module.
    """
    widths, candidates = ([scale * number for number in numbers] for numbers in (DECISIVE, CANDIDATES))
    cost = np.log([evidence[width] for width in widths])
    misfit = {}
    for multiple in candidates:
        padded = np.array([-(-width // multiple) * multiple for width in widths])
        misfit[multiple] = float(np.std(cost - 2 * np.log(padded)))
    first, second = sorted(candidates, key=misfit.__getitem__)[:2]
    if misfit[first] <= GOOD_FIT and misfit[second] >= CLEAR_LEAD * misfit[first]:
        return Step(first, dict(evidence), misfit, "probe")
    return Step(otherwise or default_step(), dict(evidence), misfit, source)
