"""What the parts of the method are worth: the same cells of the frontier with one of them left out or replaced.

    python -m benchmarks.variants --data PATH

ResNet-20 on CIFAR-10, one epoch in float32; last step, all 10,000 test images. Every finished cell is written at once,
and a second call continues where the first stopped.
"""

import argparse
import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, markdown, run_cells, spread, stored
from benchmarks.frontier import Setup, ours, setup
from diffprune.recover import accuracy

RESULTS = Path(__file__).parent / "results" / "variants.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no search": {"search": 0.0},
    "search of 30 %": {"search": 0.3},
    "deterministic gates": {"gate": "diffprune-deterministic"},
    "Hard Concrete gates": {"gate": "hard-concrete"},
    "no hints": {"hints": 0.0},
    "no fit": {"compensate": False},
}
"""Fields of the recipe, or the gate."""


def compressed(given: Setup, gate: str = "diffprune", **fields: Any) -> float:
    """Accuracy of ours with another `gate`, and other `fields` of the recipe."""
    small = ours(given, gate=gate, recipe=replace(given.recipe, **fields))
    return accuracy(small, given.data.val)[0]


def measure(cell: Cell, folder: Path) -> Cell:
    found = {"accuracy": compressed(setup(cell, folder, "cpu"), **VARIANTS[cell["variant"]])}
    print({**cell, **found}, flush=True)
    return found


def grid(network: str, variants: list[str], factors: list[float], seeds: list[int]) -> list[Cell]:
    return [
        {"network": network, "epochs": 1.0, "factor": factor, "variant": variant, "seed": seed}
        for seed, variant, factor in itertools.product(seeds, variants, factors)
    ]


def table(results: list[Cell]) -> str:
    """One line for each variant, one column for each factor: mean and sample standard deviation over the seeds."""
    factors = sorted({r["factor"] for r in results})
    rows = []
    for variant in VARIANTS:
        mine = [[100 * r["accuracy"] for r in results if (r["variant"], r["factor"]) == (variant, f)] for f in factors]
        if any(mine):
            runs = ", ".join(sorted({str(len(accuracies)) for accuracies in mine}))
            rows.append((variant, *(spread(accuracies) if accuracies else "" for accuracies in mine), runs))
    return markdown(("variant", *(f"{factor:g}x" for factor in factors), "runs"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and weights/")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--factors", type=float, nargs="+", default=[2, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    run_cells(RESULTS, grid("resnet20", args.variants, args.factors, args.seeds), partial(measure, folder=args.data))
    print(table(stored(RESULTS)[1]))


if __name__ == "__main__":
    main()
