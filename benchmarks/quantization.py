"""Pruning times quantization: torchvision's networks dense and pruned, in float32, int8 and float16, at 224 pixels.

    python -m benchmarks.quantization

The weights are random, statistics and affine parameters of BatchNorm included, as are the keeps (multiples of 16) and
the images; what is measured is speed, size and how far the numbers move, not accuracy. One thread. "int8 x86" is 8-bit
weights on a CPU with VNNI and 7-bit ones without; "int8 tensorrt" and "fp16" are made for GPUs and only run here. The
speed-up is over the dense float32 file; SQNR and agreement compare a file with the float32 file it was made from.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor

import export
import surgery
from benchmarks.cells import Cell, markdown, run_cells
from benchmarks.torchvision_models import random_keep, randomised_

RESULTS = Path(__file__).parent / "results" / "quantization.json"
NAMES = ("resnet18", "mobilenet_v2")
NETWORKS = ("dense", "pruned")
PRECISIONS = ("fp32", "int8 x86", "int8 tensorrt", "fp16")
STEP = 16
IMAGES = 64
"""To calibrate with, and as many others to compare on."""


def measure(cell: Cell, folder: Path) -> Cell:
    dense, own = (float32(folder, cell["model"], network, cell["seed"]) for network in ("dense", cell["network"]))
    try:
        file, found = smaller(own, cell["precision"], cell["seed"])
    except export.ParityFailed as refusal:  # one of the things that this benchmark is to show
        return {"refused": str(refusal).splitlines()[0]}
    latency = export.compare(dense, file, seconds=cell["seconds"])
    found |= {
        "bytes": file.stat().st_size, "dense_bytes": dense.stat().st_size,
        "dense_ms": latency.dense.median, "ms": latency.small.median,
        "speedup": latency.speedup, "low": latency.low, "high": latency.high, "warnings": list(latency.warnings),
    }
    print(cell, found, flush=True)
    return found


def float32(folder: Path, name: str, network: str, seed: int) -> Path:
    """The exported network, dense or cut by a random keep; made once."""
    path = folder / f"{name}-{network}-{seed}.onnx"
    if not path.exists():
        torch.manual_seed(seed)
        model = randomised_(torchvision.models.get_model(name, weights=None)).eval()
        example = torch.randn(2, 3, 224, 224)
        if network == "pruned":
            graph = surgery.trace(model, example)
            model = surgery.cut(model, graph, random_keep(surgery.SizeModel(graph), STEP, seed))
        export.to_onnx(model, example, path)
    return path


def smaller(own: Path, precision: str, seed: int) -> tuple[Path, Cell]:
    """The file in the given precision, how it was made, and how far it is from the float32 file on new images."""
    if precision == "fp32":
        return own, {}
    output = own.with_name(f"{own.stem}-{precision.replace(' ', '-')}.onnx")
    kind, _, target = precision.partition(" ")
    if kind == "int8":
        made = export.quantize(own, output, images(seed + 1), target=target)
    else:
        made = export.to_fp16(own, output, images(seed + 1))
    found, wanted = (export.answers(path, [x.numpy() for x in images(seed + 2)]) for path in (output, own))
    fidelity = export.fidelity(found, wanted)
    return output, {
        "recipe": dict(made.recipe), "sqnr_db": fidelity.sqnr_db, "top1_agreement": fidelity.top1_agreement
    }


def images(seed: int) -> tuple[Tensor, ...]:
    """Standard normal, in small batches: every activation of a batch is looked at."""
    return torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(seed)).split(8)


def table(results: list[Cell]) -> str:
    rows = [
        (r["model"], r["network"], r["precision"], "refused: " + r["refused"], *[""] * 5)
        if "refused" in r
        else (
            r["model"],
            r["network"],
            r["precision"],
            f"{r['dense_ms']:.1f} → {r['ms']:.1f}",
            f"{r['speedup']:.2f}",
            f"{r['low']:.2f} to {r['high']:.2f}",
            f"{r['dense_bytes'] / 1e6:.1f} → {r['bytes'] / 1e6:.1f}",
            f"{r['sqnr_db']:.1f}" if "sqnr_db" in r else "",
            f"{r['top1_agreement']:.0%}" if "top1_agreement" in r else "",
        )
        for r in results
    ]
    head = ("model", "network", "precision", "ms", "speed-up", "95 % interval", "MB", "SQNR dB", "agreement")
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--seconds", type=float, default=10.0, help="of interleaved rounds for each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    cells: list[Cell] = [
        {"model": model, "network": network, "precision": precision, "seconds": args.seconds, "seed": args.seed}
        for model in args.models
        for network in args.networks
        for precision in args.precisions
        if (network, precision) != ("dense", "fp32")
    ]
    with tempfile.TemporaryDirectory() as folder:
        print(table(run_cells(args.results, cells, partial(measure, folder=Path(folder)))))


if __name__ == "__main__":
    main()
