"""What gates cost: time and memory of a training step with gates over the same step without, in interleaved pairs.

    python -m benchmarks.overhead

Steps are forward, backward and SGD with momentum; the gated one also meets the budget, tells the expected MACs and
updates the gates. Memory is the largest sum of all storages that live at one time of a step, seen by torch's profiler.
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model

import surgery
from benchmarks.cells import Cell, markdown, run_cells
from benchmarks.cifar_resnet import CifarResNet
from diffprune import Budget, attach
from diffprune.search import GATE_LR, follow_
from export.statistics import median_interval

RESULTS = Path(__file__).parent / "results" / "overhead.json"
NETWORKS = {"resnet20": (32, 128), "resnet18": (224, 32), "resnet50": (224, 16), "mobilenet_v2": (224, 32)}
"""Names, image sizes and batches, as such networks are trained."""


def build(name: str) -> nn.Module:
    return CifarResNet(3) if name == "resnet20" else get_model(name, num_classes=10)


def measure(cell: Cell) -> Cell:
    torch.manual_seed(0)
    size, batch = NETWORKS[cell["network"]]
    model, x, labels = build(cell["network"]), torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    gated = attach(model, surgery.trace(model.eval(), x[:2]))
    budget = Budget(macs=0.5)
    gates = torch.optim.Adam(gated.parameters_of_gates(), lr=GATE_LR)

    def searching() -> None:
        follow_(gated, budget, 0.9)
        float(gated.size.macs(gated.chance().detach().cpu()))  # what a search tells of each step
        gates.zero_grad()
        step(gated)
        gates.step()

    step_plain, step = stepper(model, x, labels), stepper(gated, x, labels)
    runs = {"plain": lambda: step_plain(model), "gated": searching}
    samples = interleaved(runs, cell["rounds"])
    ratios = [gated / plain for gated, plain in zip(samples["gated"], samples["plain"], strict=True)]
    ratio = median_interval(np.array(ratios), seed=0)  # of pairs: what slows the machine for seconds slows both
    resident = 3 * sum(p.numel() * p.element_size() for p in model.parameters())  # with gradients and momentum
    memory = {name: peak(run, resident) for name, run in runs.items()}
    return {
        "plain_ms": 1e3 * sorted(samples["plain"])[cell["rounds"] // 2],
        "time": ratio.value, "low": ratio.low, "high": ratio.high,
        "plain_mb": memory["plain"] / 1e6, "memory": memory["gated"] / memory["plain"],
    }


def stepper(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[nn.Module], None]:
    model.train()
    weights = [p for n, p in model.named_parameters() if n != "logits"]
    optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=0.9)

    def step(net: nn.Module) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()

    return step


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    order, samples = random.Random(0), {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name in order.sample(list(runs), len(runs)):
            started = time.perf_counter()
            runs[name]()
            if round_ >= 2:  # the first ones warm up
                samples[name].append(time.perf_counter() - started)
    return samples


def peak(run: Callable[[], None], resident: int) -> int:
    """Bytes at the peak of a step: those `resident` before it, and the largest sum of what it takes and gives back."""
    run()
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return resident + max(itertools.accumulate(changes))


def table(results: list[Cell]) -> str:
    head = ("network", "plain step ms", "time", "95 % interval", "plain MB", "memory")
    return markdown(head, [
        (r["network"], f"{r['plain_ms']:.0f}", f"{r['time']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}",
         f"{r['plain_mb']:.0f}", f"{r['memory']:.3f}")
        for r in results
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    print(table(run_cells(RESULTS, [{"network": n, "rounds": args.rounds} for n in args.networks], measure)))


if __name__ == "__main__":
    main()
