"""At which channel multiple does a convolution step in cost here?

onnxruntime computes convolutions on the CPU in blocks of channels: a width between two multiples of the block costs as
much as the next multiple. The block depends on the instruction set, so it is measured.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.clocks import clock_for
from export.feeds import input_specs, random_feed, runner
from export.machine import instruction_sets
from export.rounds import run_rounds
from export.sessions import open_session
from export.settings import Settings

CANDIDATES = (4, 8, 16, 32)
# The first width below 64 that costs less is 60 at a step of 4, 56 at 8, 48 at 16 and 32 at 32. 63 is for the record:
# not a multiple of 4, it leaves the blocked path and is slower than 64.
WIDTHS = (64, 63, 60, 56, 52, 48, 32)
DECISIVE = (64, 60, 56, 52, 48, 32)
SIDE = 14
DEPTH = 4
# A staircase explains costs to within some percent; another block size misses by 10 % to 30 %.
GOOD_FIT = 0.12
CLEAR_LEAD = 1.5


@dataclass(frozen=True)
class Step:
    """Keep widths at multiples of `multiple`, rounding up. `evidence` is milliseconds per width.

    `source` is "probe" when the measurement decided, "instruction set" when it was inconclusive. `misfit` holds, per
    candidate, the standard deviation of log(measured / predicted).
    """

    multiple: int
    evidence: Mapping[int, float]
    misfit: Mapping[int, float]
    source: Literal["probe", "instruction set"]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, whose keys are strings."""
        return {
            "multiple": self.multiple, "source": self.source,
            "evidence": {str(width): cost for width, cost in self.evidence.items()},
            "misfit": {str(multiple): error for multiple, error in self.misfit.items()},
        }


def default_step() -> int:
    """The step by instruction set alone, without measuring: 16 with AVX-512, 8 otherwise."""
    return 16 if "avx512f" in instruction_sets() else 8


def probe_step(*, threads: int = 1, seconds_budget: float = 3.0, seed: int = 0) -> Step:
    """Measure stacks of 3x3 convolutions of several widths in interleaved rounds, and find the step in their cost.

    Takes about `seconds_budget` plus two seconds of loading and warming up.

    Raises:
        CannotMeasure: no threads, or no time.
    """
    with tempfile.TemporaryDirectory() as folder:
        candidates = []
        for width in WIDTHS:
            path = Path(folder) / f"{width}.onnx"
            onnx.save(_stack(width, seed), str(path))
            session = open_session(path, threads=threads)
            feed = random_feed(input_specs(session, batch=1, path=path), seed=seed)
            candidates.append(runner(session, feed, device="cpu"))
        timer = clock_for(Settings("cpu", threads, 1, seed)).timer
        rounds = run_rounds(candidates, seconds=seconds_budget, seed=seed, timer=timer)
    medians = np.median(rounds.milliseconds, axis=1)
    return decide({width: float(median) for width, median in zip(WIDTHS, medians, strict=True)})


def decide(evidence: Mapping[int, float]) -> Step:
    """The candidate whose staircase fits best: cost(C) ~ (s * ceil(C / s))^2 for a layer with C channels in and out.

    It has to fit well, and clearly better than the others; otherwise the instruction set decides.
    """
    cost = np.log([evidence[width] for width in DECISIVE])
    misfit = {}
    for multiple in CANDIDATES:
        padded = np.array([-(-width // multiple) * multiple for width in DECISIVE])
        misfit[multiple] = float(np.std(cost - 2 * np.log(padded)))
    first, second = sorted(CANDIDATES, key=misfit.__getitem__)[:2]
    if misfit[first] <= GOOD_FIT and misfit[second] >= CLEAR_LEAD * misfit[first]:
        return Step(first, dict(evidence), misfit, "probe")
    return Step(default_step(), dict(evidence), misfit, "instruction set")


def _stack(width: int, seed: int) -> onnx.ModelProto:
    """DEPTH 3x3 convolutions with ReLU, `width` channels in and out, on maps of SIDE x SIDE, batch 1."""
    generator = np.random.default_rng(seed)
    nodes, weights, value = [], [], "input"
    for index in range(DEPTH):
        kernel = generator.standard_normal((width, width, 3, 3)) / np.sqrt(9 * width)
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"weight_{index}"))
        nodes.append(helper.make_node("Conv", [value, f"weight_{index}"], [f"conv_{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"conv_{index}"], [f"relu_{index}"]))
        value = f"relu_{index}"
    shape = [1, width, SIDE, SIDE]
    graph = helper.make_graph(
        nodes,
        f"stack_{width}",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
        weights,
    )
    # Pinned: the newest ones that onnx writes by default are ahead of what onnxruntime reads.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
