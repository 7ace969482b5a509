"""What pruning gains on a GPU: torchvision's networks, dense against pruned, in torch and onnxruntime.

    python -m benchmarks.gpu

Random weights and random keeps at 224 pixels, as in benchmarks.torchvision_models; widths stay multiples of 16, which
tensor cores want in half precision. Every cell is one interleaved comparison, timed by CUDA events, or
for onnxruntime by the clock, with inputs and outputs on the GPU. With batch 1 a large GPU mostly waits for the next
launch, which the CUDA graph takes away. Runtime "onnx" needs onnxruntime-gpu.
"""

import argparse
import atexit
import functools
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import export
import surgery
from benchmarks.cells import Cell, markdown, run_cells
from benchmarks.torchvision_models import random_keep, randomised_

RESULTS = Path(__file__).parent / "results" / "gpu.json"
NAMES = ("resnet50", "mobilenet_v2", "vit_b_16")
RUNTIMES = ("eager", "cuda-graph", "compile", "onnx")
PRECISIONS = ("fp32", "tf32", "fp16")


def measure(cell: Cell, device: str = "cuda") -> Cell:
    which = cell["model"], cell["round_to"], cell["seed"]
    dense, small, example, macs = networks(*which)
    settings = {key: cell[key] for key in ("precision", "batch", "seconds", "seed")}
    try:
        if cell["runtime"] == "onnx":
            found = export.compare(*files(*which), device=device, **settings)
        else:
            found = export.compare_networks(
                dense, small, example, device=device, runtime=cell["runtime"], **settings
            )
    except export.CannotMeasure as error:
        return {"failure": str(error)}
    result = {
        "macs": macs, "dense_ms": found.dense.median, "pruned_ms": found.small.median,
        "speedup": found.speedup, "low": found.low, "high": found.high, "verdict": found.verdict,
        "images_per_second": found.small.throughput, "gpu": found.machine.gpu, "warnings": list(found.warnings),
    }
    print(cell, result, flush=True)
    return result


@functools.lru_cache(maxsize=1)
def networks(name: str, round_to: int, seed: int) -> tuple[nn.Module, nn.Module, Tensor, float]:
    """Dense and pruned network, an image for them, and how many times fewer MACs the pruned one has."""
    torch.manual_seed(seed)
    dense = randomised_(torchvision.models.get_model(name, weights=None)).eval()
    for parameter in dense.parameters():
        if parameter.dim() > 1 and not parameter.any():  # vit_b_16's head, with which all outputs were alike
            nn.init.normal_(parameter, std=0.02)
    example = torch.randn(2, 3, 224, 224)
    graph = surgery.trace(dense, example)
    size = surgery.SizeModel(graph)
    keep = random_keep(size, round_to, seed)
    small = surgery.cut(dense, graph, keep)
    surgery.check_equal(surgery.mask(dense, graph, keep), small, example)
    return dense, small, example[:1], size.dense.macs / size.of(keep).macs


@functools.lru_cache(maxsize=1)
def files(name: str, round_to: int, seed: int) -> tuple[Path, Path]:
    """Both as ONNX files, which go with this process."""
    dense, small, example, _ = networks(name, round_to, seed)
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return tuple(export.to_onnx(model, example, folder / f"{i}.onnx").path for i, model in enumerate((dense, small)))


def table(results: list[Cell]) -> str:
    """A row for each cell, the failures without numbers."""
    rows = []
    for r in results:
        found = (r.get("failure", "").partition("\n")[0], "", "", "")
        if "failure" not in r:
            medians = f"{r['dense_ms']:.3g} → {r['pruned_ms']:.3g}"
            found = f"{r['macs']:.2f}", medians, f"{r['speedup']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}"
        rows.append((r["model"], str(r["batch"]), r["precision"], r["runtime"], *found))
    head = ("network", "batch", "precision", "runtime", "MACs ratio", "ms", "speed-up", "95 % interval")
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--runtimes", nargs="+", default=RUNTIMES[:2], choices=RUNTIMES)
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each comparison")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no CUDA device: nothing was measured, and nothing stands in for it")
    cells = [
        {
            "model": name, "batch": batch, "precision": precision, "runtime": runtime,
            "round_to": args.round_to, "seconds": args.seconds, "seed": args.seed,
        }
        for name in args.models
        for batch in args.batches
        for precision in args.precisions
        for runtime in args.runtimes
    ]  # fmt: skip
    print(table(run_cells(args.output, cells, measure)))


if __name__ == "__main__":
    main()
