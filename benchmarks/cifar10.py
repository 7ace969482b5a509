"""ResNets on CIFAR-10: accuracy after each stage, on all 10,000 test images, and the measured speed-up.

python -m benchmarks.cifar10 --data PATH --epochs 3 --seeds 0 1 2
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

import export
from benchmarks.cells import Cell, markdown, run_cells
from benchmarks.cifar_resnet import pretrained
from diffprune import Budget, compress
from diffprune.data import load_data

RESULTS = Path(__file__).parent / "results" / "cifar10.json"
STAGES = ("dense", "after_cut", "after_recalibration", "pruned")


def measure(cell: Cell, data: Path) -> Cell:
    loaded = load_data(f"cifar10:{data / 'cifar10'}", batch=128, seed=cell["seed"])
    model = pretrained(cell["depth"], data)
    started = time.perf_counter()
    result = compress(
        copy.deepcopy(model),
        loaded.train,
        loaded.val,
        budget=Budget(macs=cell["macs"]),
        epochs=cell["epochs"],
        round_to=cell["round_to"],
        seed=cell["seed"],
    )
    minutes = (time.perf_counter() - started) / 60
    example = next(iter(loaded.val))[0][:2]
    with tempfile.TemporaryDirectory() as folder:
        dense = export.to_onnx(model, example, Path(folder) / "dense.onnx")
        small = export.to_onnx(result.model, example, Path(folder) / "small.onnx")
        latency = export.compare(dense.path, small.path)
    report = result.report
    found = {
        **{stage: report["accuracy"][stage] for stage in STAGES},
        "examples": report["accuracy"]["examples"],
        "macs_left": report["macs"]["pruned"] / report["macs"]["dense"],
        "params_left": report["params"]["pruned"] / report["params"]["dense"],
        "masked_vs_cut": report["equivalence"]["masked_vs_cut"],
        "cut_vs_onnx": small.parity.worst,
        "dense_ms": latency.dense.median,
        "pruned_ms": latency.small.median,
        "speedup": latency.speedup,
        "low": latency.low,
        "high": latency.high,
        "noise": [latency.noise.low, latency.noise.high],
        "warnings": list(latency.warnings),
        "minutes": minutes,
        "search_steps": report["training"]["search_steps"],
        "steps": report["training"]["steps"],
        "widths": [group["kept"] for group in report["groups"]],
        "pinned": sorted({pin["reason"] for pin in report["pinned"]}),
    }
    print({**cell, **{k: v for k, v in found.items() if k not in ("widths", "pinned")}}, flush=True)
    return found


def table(results: list[Cell]) -> str:
    """One line for each setting: mean and sample standard deviation over the seeds, accuracy in percent."""
    keys = list(dict.fromkeys((r["depth"], r["macs"], r["epochs"], r["round_to"]) for r in results))
    rows = []
    for key in keys:
        mine = [r for r in results if (r["depth"], r["macs"], r["epochs"], r["round_to"]) == key]
        accuracy = [_spread([100 * r[stage] for r in mine], 2) for stage in STAGES]
        rows.append(
            (
                f"ResNet-{key[0]}",
                f"{mean(r['macs_left'] for r in mine):.3f}",
                str(key[2]),
                str(key[3]),
                " ".join(str(r["seed"]) for r in mine),
                *accuracy,
                _spread([r["speedup"] for r in mine], 2),
                f"{min(r['low'] for r in mine):.2f} to {max(r['high'] for r in mine):.2f}",
                _spread([r["minutes"] for r in mine], 1),
            )
        )
    head = (
        "network",
        "MACs left",
        "epochs",
        "round to",
        "seeds",
        "dense %",
        "after cut %",
        "recalibrated %",
        "end %",
        "speed-up",
        "intervals",
        "minutes",
    )
    return markdown(head, rows)


def _spread(values: list[float], digits: int) -> str:
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 or max(values) == min(values) else f"{text} ± {stdev(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and weights/")
    parser.add_argument("--depth", type=int, nargs="+", default=[56], choices=[20, 56])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--epochs", type=float, nargs="+", default=[3.0])
    parser.add_argument("--round-to", type=int, nargs="+", default=[4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    cells = [
        {"depth": d, "macs": m, "epochs": e, "round_to": r, "seed": s}
        for d in args.depth
        for m in args.macs
        for e in args.epochs
        for r in args.round_to
        for s in args.seeds
    ]
    print(table(run_cells(RESULTS, cells, lambda cell: measure(cell, args.data))))


if __name__ == "__main__":
    main()
