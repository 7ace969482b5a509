"""Is what `export.compare` claims true? Pairs of files whose ratio is known, on a quiet machine and on a loaded one.

    python -m benchmarks.measuring

The files are stacks of the same convolution with the same weights. One against itself has the ratio 1, and the interval
should hold that in 95 of 100 trials; one of twice the depth has the ratio 2, but for what both do once, which takes
0.2 ms in the median: so these are deep. The load is a process for each usable core that only counts.
"""

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import export
from benchmarks.cells import Cell, markdown, run_cells
from benchmarks.load import loaded

RESULTS = Path(__file__).parent / "results" / "measuring.json"
WIDTH, SIDE = 64, 14
DEPTH = {1: 32, 2: 64}
"""Convolutions of the shallower file, by the ratio."""
NEAR = 0.03
"""How close a known ratio should be found."""


def measure(cell: Cell) -> Cell:
    """One trial."""
    cores = max(1, round(export.this_machine().cores))
    with tempfile.TemporaryDirectory() as folder, loaded(cores) if cell["load"] else nullcontext():
        files = [Path(folder) / f"{name}.onnx" for name in ("dense", "small")]
        for file, factor in zip(files, (cell["ratio"], 1), strict=True):
            onnx.save(stack(factor * cell["depth"]), str(file))
        found = export.compare(*files, seconds=cell["seconds"], seed=cell["trial"])
    return {
        "speedup": found.speedup, "low": found.low, "high": found.high, "verdict": found.verdict,
        "dense_ms": found.dense.median, "small_ms": found.small.median, "rounds": len(found.dense.samples),
        "noise": [found.noise.low, found.noise.high], "load_before": found.machine.load_before,
        "warnings": list(found.warnings),
    }


def stack(depth: int) -> onnx.ModelProto:
    """`depth` 3x3 convolutions with ReLU that share one weight, so that a deeper one needs no more of the caches."""
    kernel = np.random.default_rng(0).standard_normal((WIDTH, WIDTH, 3, 3)) * np.sqrt(2 / (9 * WIDTH))
    nodes, value = [], "input"
    for index in range(depth):
        nodes.append(helper.make_node("Conv", [value, "kernel"], [f"conv_{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"conv_{index}"], [f"relu_{index}"]))
        value = f"relu_{index}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH, SIDE, SIDE]) for name in ("input", value)]
    weights = [numpy_helper.from_array(kernel.astype(np.float32), "kernel")]
    graph = helper.make_graph(nodes, f"stack_{depth}", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def table(results: list[Cell]) -> str:
    """A row for each kind of trial."""
    rows = []
    for ratio, load in sorted({(r["ratio"], r["load"]) for r in results}):
        trials = [r for r in results if (r["ratio"], r["load"]) == (ratio, load)]
        errors = [abs(r["speedup"] / ratio - 1) for r in trials]
        held = sum(r["low"] <= ratio <= r["high"] for r in trials)
        rows.append((
            str(ratio), "loaded" if load else "quiet", f"{held} / {len(trials)}",
            f"{sum(error <= NEAR for error in errors)} / {len(trials)}", f"{median(errors):.1%}", f"{max(errors):.1%}",
            f"{median(r['high'] / r['low'] - 1 for r in trials):.1%}",
            ", ".join(f"{sum(r['verdict'] == v for r in trials)} {v}" for v in sorted({r["verdict"] for r in trials})),
        ))  # fmt: skip
    head = (
        "true ratio", "machine", "interval holds it", f"within {NEAR:.0%}", "median error", "largest error",
        "interval width", "verdicts",
    )
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each trial")
    parser.add_argument("--ratios", type=int, nargs="+", default=[1, 2], choices=DEPTH)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    cells = [
        {"ratio": ratio, "depth": DEPTH[ratio], "load": load, "trial": trial, "seconds": args.seconds}
        for trial in range(args.trials)
        for load in (False, True)
        for ratio in args.ratios
    ]
    print(table(run_cells(args.output, cells, measure)))


if __name__ == "__main__":
    main()
