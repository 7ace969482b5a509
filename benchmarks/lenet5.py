"""LeNet-5 (20-50-800-500) on MNIST: gates learned from scratch together with the weights, then cut to dense channels.

    python -m benchmarks.lenet5 --data PATH

All 60,000 training images, shifted by up to two pixels, all 10,000 test images, the dense network after surgery, last
epoch. Shulman 2020 (DiffPrune) reports 0.6 % error without an architecture; multiply-adds are those of the literature.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from benchmarks.cells import Cell, markdown, run_cells, spread
from diffprune import Budget, MeanCentred, attach
from diffprune.data import load_data
from diffprune.feeding import Batches, endless
from diffprune.landing import land
from diffprune.recover import accuracy
from diffprune.search import search_
from diffprune.training import Recipe, fit_

RESULTS = Path(__file__).parent / "results" / "lenet5.json"
GATE = MeanCentred(noise=0.5, relaxation=0.5)
"""From scratch nothing is known of the units at first, so there is more noise than in a trained network."""


def lenet5() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


class Shifted:
    """Batches of images moved by up to two pixels in each direction, one shift for each image."""

    def __init__(self, batches: Batches, seed: int) -> None:
        self.batches, self.draw = batches, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            windows = F.pad(images, (2, 2, 2, 2), value=float(images.min())).unfold(2, 28, 1).unfold(3, 28, 1)
            top, left = torch.randint(5, (2, len(images)), generator=self.draw)
            yield windows[torch.arange(len(images)), :, top, left], labels


def measure(cell: Cell, data: Path) -> Cell:
    started, seed = time.perf_counter(), cell["seed"]
    torch.manual_seed(seed)
    loaded = load_data(f"mnist:{data}", batch=128, seed=seed)
    example = next(iter(loaded.val))[0][:2]
    epoch = -(-60_000 // 128)
    total, searching = cell["epochs"] * epoch, cell["search_epochs"] * epoch
    batches = endless(Shifted(loaded.train, seed))
    recipe = Recipe(lr=cell["lr"], distill=0.0, clip=cell["clip"])
    model = lenet5()
    graph = surgery.trace(model, example)
    gated = attach(model, graph, gate=GATE)
    budget = Budget(macs=cell["macs"])
    search_(gated, batches, budget, recipe, steps=searching, total=total, parent=None)
    landing = land(budget, gated.size, gated.scores())
    keep = gated.size.keep(landing.flat)
    small = surgery.cut(gated.folded(landing.flat), graph, keep)
    fit_(small, batches, recipe, steps=range(searching, total), total=total, phase="recover")
    size = gated.size.of(keep)
    found = {
        "error": 1 - accuracy(small, loaded.val)[0],
        "widths": [int(flags.sum()) for flags in keep.values()],
        "left_macs": size.macs,
        "left_params": size.params,
        "minutes": (time.perf_counter() - started) / 60,
    }
    print({**cell, **found}, flush=True)
    return found


def table(results: list[Cell]) -> str:
    rows = []
    for macs in sorted({r["macs"] for r in results}, reverse=True):
        mine = [r for r in results if r["macs"] == macs]
        errors = [100 * r["error"] for r in mine]
        widths = ", ".join("-".join(map(str, r["widths"])) for r in mine)
        rows.append((
            f"{1 / macs:.1f}x", spread(errors),
            widths, f"{mean(r['left_macs'] for r in mine) / 1e3:.0f} k",
            f"{mean(r['left_params'] for r in mine) / 1e3:.1f} k", f"{mean(r['minutes'] for r in mine):.1f}",
        ))
    return markdown(("fewer MACs", "error %", "filters and neurons left", "MACs", "parameters", "minutes"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder above MNIST/raw/")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.2, 0.065])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--search-epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--clip", type=float, default=2.0, help="longest gradient: without, a seed diverged at 15x")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    cells = [
        {
            "macs": m, "epochs": args.epochs, "search_epochs": args.search_epochs, "lr": args.lr, "clip": args.clip,
            "seed": s,
        }
        for s in args.seeds
        for m in args.macs
    ]
    print(table(run_cells(RESULTS, cells, lambda cell: measure(cell, args.data))))


if __name__ == "__main__":
    main()
