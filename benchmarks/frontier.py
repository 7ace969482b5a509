"""Accuracy against MACs and against measured CPU latency: diffprune beside torch-pruning's pruners.

    python -m benchmarks.frontier --data PATH --precision bfloat16 --networks resnet20 resnet56
    python -m benchmarks.frontier --data PATH --networks lenet5
    python -m benchmarks.frontier --data PATH --precision bfloat16 --device cuda --networks resnet56 resnet18 \
        --epochs 5 12 --factors 2 2.1 2.57 5 --seeds 0

From the same weights, in the same data order, with the same total number of training steps (a search or sparse
training counts), the same distillation, hints and schedule afterwards; last step, all 10,000 test images. Every
finished cell is written at once, and a second call continues where the first stopped. When all networks are trained
their latency is measured, on the CPU whatever the device; until then their ONNX files lie beside the results. Of
networks whose files are gone, because the results were taken elsewhere, the latency stays unknown.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import export
from benchmarks.cells import Cell, markdown, run_cells, spread, stored
from benchmarks.parents import PARENTS
from benchmarks.peers import PEERS, SPARSE_SHARE, macs, pruned, sparsify_
from diffprune import Budget, compress
from diffprune.calibration import CALIBRATION
from diffprune.data import Data, load_data
from diffprune.feeding import endless
from diffprune.hints import hinting
from diffprune.recover import accuracy, recalibrate_
from diffprune.training import Recipe, fit_

RESULTS = Path(__file__).parent / "results" / "frontier.json"
LATENCY = RESULTS.with_name("frontier_latency.json")
FILES = RESULTS.with_name("frontier")
PICTURE = Path(__file__).parents[1] / "docs" / "frontier.svg"
OURS: dict[str, dict[str, Any]] = {"diffprune": {"round_to": 1}, "diffprune-4": {"round_to": 4}}
"""Ours with widths as they come, like the peers, and with multiples of 4, which onnxruntime computes faster."""
CELL = ("network", "epochs", "factor", "method", "seed", "precision", "device")
"""What tells one cell from the others. A seed on a GPU is another run: rounding and the noise of gates differ."""
NOISE = 1.2
"""An interval whose ends are further apart than this factor tells nothing about a speed-up."""
SECONDS = 5.0
"""Of interleaved runs, of which one takes 1 to 4 ms."""


@dataclass(frozen=True)
class Setup:
    """What all methods of a cell share. `x` and `labels` are 1,000 training images."""

    model: nn.Module
    data: Data
    x: Tensor
    labels: Tensor
    steps: int
    share: float
    seed: int
    recipe: Recipe


def setup(cell: Cell, folder: Path, device: str) -> Setup:
    parent, seed = PARENTS[cell["network"]], cell["seed"]
    spec = parent.data.format(folder)
    data = load_data(spec, batch=128, seed=seed)
    plain = load_data(spec, batch=CALIBRATION, seed=seed, augment=False)
    x, labels = (part.to(device) for part in next(iter(plain.train)))
    steps = round(cell["epochs"] * len(data.train))
    model = parent.trained(folder, device)
    model = model.to(device, memory_format=torch.channels_last)  # a sixth faster to train, also on the CPU
    recipe = Recipe(precision=cell.get("precision", "float32"), hints=parent.hints)
    return Setup(model, data, x, labels, steps, 1 / cell["factor"], seed, recipe)


def ours(given: Setup, **options: Any) -> nn.Module:
    """With `options` of `compress`."""
    train: Any = given.data.train if given.steps else [given.x]
    epochs = given.steps / len(given.data.train)
    shared = {"recipe": given.recipe, "seed": given.seed, "device": given.x.device}
    return compress(
        given.model, train, given.data.val, budget=Budget(macs=given.share), epochs=epochs, **shared | options
    ).model


def peer(name: str, given: Setup) -> nn.Module:
    torch.manual_seed(given.seed)
    method, recipe, batches = PEERS[name], given.recipe, begun(endless(given.data.train))
    dense = copy.deepcopy(given.model)
    kept = outer_layers(dense)
    sparse = round(SPARSE_SHARE * given.steps) if method.regularises else 0
    layers = [dense.get_submodule(n) for n in kept]
    sparsify_(dense, method, layers, batches, recipe, steps=sparse, total=given.steps, parent=given.model)
    small = pruned(dense, method, given.share, kept, given.x, given.labels, given.seed)
    recalibrate_(small, given.data.train if given.steps else [given.x])  # as ours, which reads the same batches then
    hints = hinting(small, given.model, same_inputs(small, given.model), {}) if recipe.hints else nullcontext()
    with hints as hint:
        fit_(
            small, batches, recipe, steps=range(sparse, given.steps), total=given.steps, parent=given.model, hint=hint,
            phase="recover",
        )
    return small.eval()


def begun(batches: Iterator[Any]) -> Iterator[Any]:
    """The same, begun now: whatever reads the data in between has another order, and these the first."""
    return itertools.chain([next(batches)], batches)


def same_inputs(small: nn.Module, dense: nn.Module) -> list[str]:
    """Weights that read all that they did: there, peers can be given hints without knowing what they kept."""
    shapes = {name: p.shape for name, p in dense.named_parameters() if p.dim() > 1}
    return [name for name, p in small.named_parameters() if name in shapes and p.shape[1] == shapes[name][1]]


def outer_layers(model: nn.Module) -> list[str]:
    """All but what lies inside of blocks. torch-pruning runs with the residual width free as well, and loses more: 21 %
    in place of 50 % with magnitude on ResNet-20 at half the MACs, recalibrated."""
    classifier = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1]
    ends = (".conv2", ".downsample.0")
    return [name for name, _ in model.named_modules() if name in ("conv1", classifier) or name.endswith(ends)]


def measure(cell: Cell, folder: Path, device: str = "cpu") -> Cell:
    given, started = setup(cell, folder, device), time.perf_counter()
    name = cell["method"]
    small = ours(given, **OURS[name]) if name in OURS else peer(name, given)
    seconds = time.perf_counter() - started
    dense, small, image = given.model.cpu(), small.cpu(), given.x[:1].cpu()
    found = {
        "accuracy": accuracy(small, given.data.val)[0],
        "macs_left": macs(small, image) / macs(dense, image),
        "steps": given.steps,
        "seconds": seconds,
    }
    FILES.mkdir(parents=True, exist_ok=True)
    export.to_onnx(small, image, small_file(cell))
    if not dense_file(cell).exists():
        export.to_onnx(dense, image, dense_file(cell))
    print({**cell, **found}, flush=True)
    return found


def small_file(cell: Cell) -> Path:
    return FILES / ("-".join(str(cell[key]) for key in CELL if key in cell) + ".onnx")


def dense_file(cell: Cell) -> Path:
    return FILES / f"{cell['network']}.onnx"


def time_of(cell: Cell) -> Cell:
    latency = export.compare(dense_file(cell), small_file(cell), seconds=SECONDS)
    found = {"speedup": latency.speedup, "low": latency.low, "high": latency.high}
    print({**cell, **found}, flush=True)
    return found


def grid(
    networks: Iterable[str], epochs: Iterable[float], factors: Iterable[float], seeds: Iterable[int],
    precision: str = "float32", device: str = "cpu",
) -> list[Cell]:
    """Seed by seed, so that a table can be read early. ResNet-56 not at 3x."""
    trained = {"precision": precision, "device": device}
    cells: list[Cell] = []
    for seed, network, epoch, factor in itertools.product(seeds, networks, epochs, factors):
        if network == "resnet56" and factor == 3:
            continue
        for method in (*OURS, *PARENTS[network].peers):
            cell = {"network": network, "epochs": epoch, "factor": factor, "method": method, "seed": seed}
            cells.append(cell | trained if epoch else cell)
    return cells


def results() -> list[Cell]:
    """All that are stored, with their latency where it is known."""
    timed = stored(LATENCY)[1] if LATENCY.exists() else []
    return [
        {**cell, **next((t for t in timed if all(cell.get(key) == t.get(key) for key in CELL)), {})}
        for cell in stored(RESULTS)[1]
    ]


def steady(results: list[Cell]) -> list[Cell]:
    """Those whose speed-up was measured to within NOISE: not beside too much other work."""
    return [r for r in results if "high" in r and r["high"] <= NOISE * r["low"]]


def training(cell: Cell) -> str:
    """Epochs, and the precision if it is not float32."""
    precision = cell.get("precision", "float32")
    return f"{cell['epochs']:g}" + (f" {precision}" if precision != "float32" else "")


def table(results: list[Cell]) -> str:
    """One line for each setting and method: mean and sample standard deviation over the runs; minutes on the CPU."""
    rows, groups = [], {}
    for r in results:
        groups.setdefault((r["network"], r["epochs"], training(r), r["factor"], r["method"]), []).append(r)
    for (network, _, trained, factor, method), mine in sorted(groups.items(), key=lambda item: item[0][:4]):
        minutes = [r["seconds"] / 60 for r in mine if r.get("device") != "cuda" and ("gpu" not in r or "device" in r)]
        rows.append((
            PARENTS[network].title, trained, f"{factor:g}x", method, spread([100 * r["accuracy"] for r in mine]),
            f"{1 / mean(r['macs_left'] for r in mine):.2f}x",
            spread([r["speedup"] for r in steady(mine)]) if steady(mine) else "unknown",
            f"{mean(minutes):.1f}" if minutes else "unknown", str(len(mine)),
        ))
    head = ("network", "epochs", "asked", "method", "accuracy %", "fewer MACs", "speed-up", "minutes", "runs")
    return markdown(head, rows)


def picture(results: list[Cell], path: Path) -> None:
    """Accuracy against MACs and against latency, one row of panels for each network and number of epochs."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings = sorted({(r["network"], r["epochs"], training(r)) for r in results})
    methods = [m for m in (*OURS, *PEERS) if any(r["method"] == m for r in results)]
    with rc_context({"svg.hashsalt": "frontier"}):  # the same file from the same results
        figure = Figure(figsize=(10, 3.6 * len(settings)), layout="constrained")
        panels = figure.subplots(len(settings), 2, squeeze=False)
        for (network, _, trained), row in zip(settings, panels, strict=True):
            for axes, key, label in zip(row, ("macs", "latency"), ("MACs left", "latency left"), strict=True):
                for method in methods:
                    line = (network, trained, method)
                    mine = [r for r in results if (r["network"], training(r), r["method"]) == line]
                    mine = steady(mine) if key == "latency" else mine
                    points = [_point(mine, factor, key) for factor in sorted({r["factor"] for r in mine})]
                    if points:
                        x, y, error = zip(*points, strict=True)
                        axes.errorbar(x, y, error, marker="o", ms=3, label=method, **_style(method))
                axes.set(xlabel=label, ylabel="accuracy %", title=f"{PARENTS[network].title}, epochs: {trained}")
                axes.grid(alpha=0.3)
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
        figure.savefig(path, metadata={"Date": None})


def _style(method: str) -> dict[str, Any]:
    if method in OURS:
        return {"color": "black", "lw": 2, "ls": "-" if method == "diffprune" else "--", "zorder": 9}
    return {"color": f"C{list(PEERS).index(method)}"}


def _point(mine: list[Cell], factor: float, key: str) -> tuple[float, float, float]:
    """Cost left, accuracy and its spread over the seeds."""
    cells = [r for r in mine if r["factor"] == factor]
    accuracy = [100 * r["accuracy"] for r in cells]
    cost = mean(r["macs_left"] if key == "macs" else 1 / r["speedup"] for r in cells)
    return cost, mean(accuracy), stdev(accuracy) if len(cells) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/, MNIST/ and weights/")
    parser.add_argument("--networks", nargs="+", default=["lenet5", "resnet20", "resnet56"], choices=PARENTS)
    parser.add_argument("--epochs", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--factors", type=float, nargs="+", default=[2, 3, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="to train on")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="to train in")
    args = parser.parse_args()
    cells = grid(args.networks, args.epochs, args.factors, args.seeds, args.precision, args.device)
    run_cells(RESULTS, cells, lambda cell: measure(cell, args.data, args.device))
    run_cells(LATENCY, [cell for cell in cells if small_file(cell).exists()], time_of)
    print(table([found for found in results() if any(cell.items() <= found.items() for cell in cells)]))
    picture(results(), PICTURE)


if __name__ == "__main__":
    main()
