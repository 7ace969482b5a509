"""Speed-ups that were asked and speed-ups that were measured, and what MACs convert to, beside torch-pruning.

    python -m benchmarks.latency

torchvision's networks at 224 pixels with random weights and images, batch 1, one thread: this is about speed, not
accuracy. Ours ranks units by what they contribute to the answer per millisecond, cuts until the measured speed-up
is the one asked (`diffprune.stopwatch`), and is measured once more then. torch-pruning (random importance over all
layers, its own code) takes as many MACs as ours did at 2x, with its widths as they come and rounded by its `round_to`.
The table of layers is built anew for every network.
"""

import argparse
import os
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model

import export
import surgery
from benchmarks.cells import Cell, markdown, run_cells, stored
from benchmarks.peers import PEERS, macs, pruned
from benchmarks.torchvision_models import randomised_
from diffprune import Budget
from diffprune.errors import BudgetUnreachable
from diffprune.score import as_logits, contribution, per_cost
from diffprune.stopwatch import stopwatch

RESULTS = Path(__file__).parent / "results" / "latency.json"
NAMES = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "vgg16_bn", "efficientnet_b0")
ASKED = (1.5, 2.0, 3.0, 4.0)
IMAGES = 8
"""That units are ranked by: random ones tell no more of random weights."""
FASTEST = 0.1
SAME_MACS = 2.0
"""torch-pruning is given the MACs that ours has left at this speed-up."""


def measure(cell: Cell) -> Cell:
    torch.manual_seed(0)
    model = randomised_(get_model(cell["network"])).eval()
    example = torch.randn(2, 3, 224, 224)
    found = ours(model, example, cell) if cell["method"] == "diffprune" else theirs(model, example, cell)
    print({**cell, **{key: value for key, value in found.items() if key != "comparison"}}, flush=True)
    return found


def ours(model: nn.Module, example: Tensor, cell: Cell) -> Cell:
    graph, budget = surgery.trace(model, example), Budget(speedup=cell["asked"])
    tries: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        if event["phase"] == "correct":
            tries.append({key: event[key] for key in ("speedup", "low", "high", "predicted")})

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        watch = stopwatch(model, graph, example, Path(folder), step=cell["step"], tell=listen)
        built = time.perf_counter() - started
        scores = as_logits(per_cost(contribution(model, graph, torch.randn(IMAGES, 3, 224, 224)), budget, watch.size))
        try:
            watch.require_reachable(budget, cell["step"])
            landing, _ = watch.land(budget, scores, cell["step"], None, listen)
        except BudgetUnreachable as refusal:
            return {"refused": str(refusal).splitlines()[0], "tries": tries, "table_seconds": built}
        seconds = time.perf_counter() - started - built
        keep = watch.size.keep(landing.flat)
        measured = compared(model, surgery.cut(model, graph, keep), example, Path(folder))
    predicted = float(1 / budget.cost(watch.size, landing.flat.double()))
    return {**measured, "predicted": predicted, "tries": tries, "table_seconds": built, "land_seconds": seconds}


def theirs(model: nn.Module, example: Tensor, cell: Cell) -> Cell:
    same = {"network": cell["network"], "method": "diffprune", "asked": SAME_MACS}
    mine = next(r for r in stored(RESULTS)[1] if same.items() <= r.items())
    options = {"round_to": cell["step"]} if cell["method"] == "torch-pruning, rounded" else {}
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    peer = replace(PEERS["random"], options=options)
    small = pruned(model, peer, 1 / mine["macs_ratio"], head, example, torch.zeros(2, dtype=torch.long))
    with tempfile.TemporaryDirectory() as folder:
        export.for_timing(model, example, Path(folder) / "dense.onnx")
        return compared(model, small, example, Path(folder))


def compared(model: nn.Module, small: nn.Module, example: Tensor, folder: Path) -> Cell:
    """dense.onnx in `folder` against `small`."""
    file = export.for_timing(small, example, folder / "final.onnx")
    comparison = export.compare(folder / "dense.onnx", file)
    roofline = export.measure_roofline()
    layers, _ = export.layers_of(file)
    return {
        "macs_ratio": macs(model, example[:1]) / macs(small, example[:1]),
        "dense_ms": comparison.dense.median, "pruned_ms": comparison.small.median,
        "speedup": comparison.speedup, "low": comparison.low, "high": comparison.high,
        "roofline": asdict(roofline), "roofline_ms": sum(roofline.ms(layer) for layer in layers),
        "comparison": comparison.as_dict(),
    }  # fmt: skip


def undisturbed(r: Cell) -> float:
    """The speed-up by the fastest tenth of the runs of either network: the table holds fastest runs as well."""
    dense, small = (np.quantile(r["comparison"][name]["samples"], FASTEST) for name in ("dense", "small"))
    return float(dense / small)


def table(results: list[Cell]) -> str:
    rows = []
    for r in results:
        asked = f"{r['asked']:g}x" if r["method"] == "diffprune" else "same MACs"
        if "refused" in r:
            rows.append((r["network"], r["method"], asked, "", "refused: " + r["refused"], "", "", "", "", ""))
            continue
        ours_ = "predicted" in r
        rows.append((
            r["network"], r["method"], asked, f"{r['macs_ratio']:.2f}x",
            f"{r['speedup']:.2f}x [{r['low']:.2f}, {r['high']:.2f}]", f"{r['dense_ms']:.1f} → {r['pruned_ms']:.1f}",
            f"{r['speedup'] / r['macs_ratio']:.0%}",
            f"{r['predicted'] / r['speedup'] - 1:+.1%} ({r['predicted'] / undisturbed(r) - 1:+.1%})" if ours_ else "",
            f"{r['roofline_ms'] / r['pruned_ms']:.0%}", str(len(r["tries"])) if ours_ else "",
        ))  # fmt: skip
    head = ("network", "method", "asked", "fewer MACs", "faster", "ms", "conversion", "table", "roofline", "tries")
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--asked", type=float, nargs="+", default=list(ASKED))
    args = parser.parse_args()
    step = export.probe_step().multiple
    asked = [("diffprune", speedup) for speedup in args.asked]
    methods = [*asked, ("torch-pruning", SAME_MACS), ("torch-pruning, rounded", SAME_MACS)]
    cells = [
        {"network": network, "method": method, "asked": speedup, "step": step}
        for network in args.networks
        for method, speedup in methods
    ]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # tables are built, not remembered
        print(table(run_cells(RESULTS, cells, measure)))


if __name__ == "__main__":
    main()
