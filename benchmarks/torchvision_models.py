"""torchvision's networks through trace, mask, cut, check, export and compare, with random keeps at 224 pixels.

    python -m benchmarks.torchvision_models

The weights are random, statistics and affine parameters of BatchNorm included, so that every check could fail; what is
measured is exactness and speed, not accuracy. Every group closes a random share of its units; widths stay multiples of
the step that is probed on this machine, by re-opening units.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import export
import surgery
from benchmarks.cells import Cell, markdown, run_cells
from diffprune.landing import steps
from diffprune.recover import recalibrate_

RESULTS = Path(__file__).parent / "results" / "torchvision_models.json"
NAMES = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "densenet121",
    "vgg11_bn",
    "googlenet",
    "regnet_y_400mf",
    "squeezenet1_1",
)
CLOSED = (0.25, 0.75)
"""Least and largest share of a group's units that a random keep closes, before rounding up."""


def measure(cell: Cell) -> Cell:
    torch.manual_seed(cell["seed"])
    model = randomised_(torchvision.models.get_model(cell["model"], weights=None, **_options(cell["model"]))).eval()
    example = torch.randn(2, 3, 224, 224)
    started = time.perf_counter()
    graph = surgery.trace(model, example)
    seconds = time.perf_counter() - started
    size = surgery.SizeModel(graph)
    keep = random_keep(size, cell["round_to"], cell["seed"])
    small = surgery.cut(model, graph, keep)
    error = surgery.check_equal(surgery.mask(model, graph, keep), small, example)
    with tempfile.TemporaryDirectory() as folder:
        dense_file = export.to_onnx(model, example, Path(folder) / "dense.onnx")
        small_file = export.to_onnx(small, example, Path(folder) / "small.onnx")
        latency = export.compare(dense_file.path, small_file.path)
    dense, left = size.dense, size.of(keep)
    assert left.params == sum(p.numel() for p in small.parameters())
    found = {
        "groups": len(graph.groups),
        "units": graph.units,
        "closed": int((~size.flat(keep)).sum()),
        "untouched": [g.name for g in graph.groups if keep[g.name].all()],
        "trace_seconds": seconds,
        "masked_vs_cut": error,
        "cut_vs_onnx": small_file.parity.worst,
        "macs": dense.macs / left.macs,
        "params": dense.params / left.params,
        "dense_ms": latency.dense.median,
        "pruned_ms": latency.small.median,
        "speedup": latency.speedup,
        "low": latency.low,
        "high": latency.high,
        "warnings": list(latency.warnings),
    }
    print(cell["model"], found, flush=True)
    return found


def random_keep(size: surgery.SizeModel, round_to: int, seed: int) -> dict[str, Tensor]:
    """Close a random share of every group, then re-open units up to the next step of its width."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group, step in zip(size.graph.groups, steps(size, round_to), strict=True):
        share = CLOSED[0] + (CLOSED[1] - CLOSED[0]) * torch.rand((), generator=generator).item()
        wanted = max(round((1 - share) * group.units), 1)
        order = torch.randperm(group.units, generator=generator)
        keep[group.name] = torch.zeros(group.units, dtype=torch.bool)
        keep[group.name][order[: -(-wanted // step) * step]] = True
    return keep


def randomised_(model: nn.Module) -> nn.Module:
    """Random affine parameters and the statistics that go with them, so that no channel is zero or constant by luck."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
    recalibrate_(model, [torch.randn(8, 3, 224, 224)])
    return model


def _options(name: str) -> dict[str, object]:
    """GoogLeNet without auxiliary heads: they are trained with, not shipped."""
    return {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}


def table(results: list[Cell]) -> str:
    rows = [
        (
            r["model"],
            str(r["groups"]),
            f"{r['closed']} / {r['units']}",
            f"{r['trace_seconds']:.1f}",
            f"{r['masked_vs_cut']:.0e}",
            f"{r['cut_vs_onnx']:.0e}",
            f"{r['macs']:.2f}",
            f"{r['dense_ms']:.1f} → {r['pruned_ms']:.1f}",
            f"{r['speedup']:.2f}",
            f"{r['low']:.2f} to {r['high']:.2f}",
            f"{r['speedup'] / r['macs']:.0%}",
        )
        for r in results
    ]
    head = (
        "network",
        "groups",
        "units closed",
        "trace s",
        "cut error",
        "ONNX error",
        "MACs ratio",
        "ms",
        "speed-up",
        "95 % interval",
        "conversion",
    )
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--round-to", type=int, help="default: probed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    step = args.round_to or export.probe_step().multiple
    cells = [{"model": name, "round_to": step, "seed": args.seed} for name in args.models]
    print(table(run_cells(RESULTS, cells, measure)))


if __name__ == "__main__":
    main()
