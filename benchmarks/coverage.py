"""Networks of a library through trace, mask, cut, check, training and export: torchvision's, or timm's.

    python -m benchmarks.coverage
    python -m benchmarks.coverage --library timm --seeds 0 1

The weights are random and no parameter is constant, so that every check could fail; what is shown is that every
network can be cut anywhere and stays exact, not accuracy. Each finished network is written at once; a second call
continues, and tries again what failed.
"""

import argparse
import gc
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import export
import surgery
from benchmarks.cells import Cell, markdown, run_cells, stored
from benchmarks.libraries import LIBRARIES, Library
from diffprune.recover import recalibrate_

KEPT = (0.25, 0.75)
"""Least and largest share of a group's units that a random keep leaves."""
DOUBLE_BELOW = 30_000_000
"""Parameters below which the cut is checked in float64 too."""
ENDS = ("model input", "model output")


def measure(cell: Cell, library: Library) -> Cell:
    """A row; if a step fails, what was found before it and the failure."""
    found: Cell = {}
    started = time.perf_counter()
    try:
        torch.manual_seed(0)
        model, pixels = library.build(cell["model"])
        example = torch.randn(2, 3, pixels, pixels)
        for part in steps(randomised_(model.eval(), torch.randn(4, 3, pixels, pixels)), example, cell["seeds"]):
            found |= part
    except Exception as error:  # whatever it is, it is this network's result, and the next one has its turn
        traceback.print_exc()
        found["failure"] = f"{type(error).__name__}: {error}"
    gc.collect()  # exported programs hold cycles, and the next network may need all memory
    found["seconds"], found["threads"] = time.perf_counter() - started, torch.get_num_threads()
    print(cell["model"], found, flush=True)
    return found


def steps(model: nn.Module, example: Tensor, seeds: Sequence[int]) -> Iterator[Cell]:
    """The parts of a row, each as soon as it is known. `example` has shape (batch, channels, height, width)."""
    started = time.perf_counter()
    graph = surgery.trace(model, example)
    yield {"trace_seconds": time.perf_counter() - started, **facts(graph)}
    size = surgery.SizeModel(graph)
    single, double = [], []
    for seed in seeds:
        keep = random_keep(graph, seed)
        masked, small = surgery.mask(model, graph, keep), surgery.cut(model, graph, keep)
        single.append(surgery.check_equal(masked, small, example))
        _check_params(size.of(keep).params, small)
        if size.dense.params < DOUBLE_BELOW:
            double.append(surgery.check_equal(masked.double(), small.double(), example.double()))
            small.float()  # exact: every value came from float32
        del masked
        yield {"cut_error": max(single), "cut_error_double": max(double, default=None)}
        if seed == seeds[0]:
            yield {"params": size.dense.params / size.of(keep).params, "macs": size.dense.macs / size.of(keep).macs}
            with tempfile.TemporaryDirectory() as folder:
                yield {"onnx_error": export.to_onnx(small, example, Path(folder) / "small.onnx").parity.worst}
            yield {"losses": trained_(small, example)}


def facts(graph: surgery.ChannelGraph) -> Cell:
    """What a graph leaves free. `pinned` counts channels by reason, those of inputs and outputs excepted."""
    pinned: Counter[str] = Counter()
    for pin in graph.pinned:
        if pin.reason not in ENDS:
            pinned[pin.reason] += len(pin.channels)
    return {"groups": len(graph.groups), "units": graph.units, "pinned": pinned, "free_macs": free_macs(graph)}


def free_macs(graph: surgery.ChannelGraph) -> float:
    """MACs of the layers of whose weight at least one axis holds units, as a share of the MACs of all layers."""
    free = {slot.tensor for group in graph.groups for slot in group.slots}
    shapes = {**graph.buffers, **graph.shapes}
    macs = {layer.weight: layer.repeats * torch.Size(shapes[layer.weight]).numel() for layer in graph.layers}
    return sum(n for weight, n in macs.items() if weight in free) / (sum(macs.values()) + sum(graph.fixed.values()))


def random_keep(graph: surgery.ChannelGraph, seed: int) -> dict[str, Tensor]:
    """A random share of the units of every group; of two units or more at least one is kept and one is closed."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in graph.groups:
        share = KEPT[0] + (KEPT[1] - KEPT[0]) * torch.rand((), generator=generator).item()
        wanted = max(1, min(round(share * group.units), group.units - 1))
        keep[group.name] = torch.randperm(group.units, generator=generator) < wanted
    return keep


def randomised_(model: nn.Module, images: Tensor) -> nn.Module:
    """No parameter stays constant, such as a head of zeros; BatchNorm has the statistics of `images`."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
                fan_in = parameter[0].numel() if parameter.dim() == 2 else 1
                parameter.add_(torch.rand_like(parameter).sub_(0.5), alpha=fan_in**-0.5)
    recalibrate_(model, [images])
    return model


def trained_(model: nn.Module, images: Tensor) -> list[float]:
    """One step of SGD in train mode, on the mean square of all outputs: the loss before and after it.

    Raises ValueError if a loss or a gradient is not finite, or a parameter has no gradient.
    """
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    before = _loss(model, images)
    before.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise ValueError(f"after the cut {name} has {'no' if parameter.grad is None else 'an infinite'} gradient")
    optimiser.step()
    with torch.no_grad():
        losses = [before.item(), _loss(model, images).item()]
    if not torch.tensor(losses).isfinite().all():
        raise ValueError(f"a step of SGD after the cut takes the loss from {losses[0]} to {losses[1]}")
    return losses


def _loss(model: nn.Module, images: Tensor) -> Tensor:
    outputs = torch.utils._pytree.tree_leaves(model(images))
    return torch.stack([output.square().mean() for output in outputs if isinstance(output, Tensor)]).sum()


def _check_params(predicted: int, small: nn.Module) -> None:
    counted = sum(parameter.numel() for parameter in small.parameters())
    if counted != predicted:
        raise ValueError(f"the cut network has {counted} parameters; the size model predicts {predicted}")


def table(results: list[Cell]) -> str:
    head = (
        "network",
        "groups",
        "units free",
        "pinned",
        "MACs free",
        "trace s",
        "cut error",
        "in float64",
        "ONNX error",
        "keeps",
        "failure",
    )
    return markdown(head, [_row(result) for result in results])


def _row(result: Cell) -> tuple[str, ...]:
    failure = result.get("failure", "").partition("\n")[0].replace("|", "\\|")
    if "units" not in result:
        return (result["model"], *[""] * 9, failure)
    return (
        result["model"],
        str(result["groups"]),
        str(result["units"]),
        str(sum(result["pinned"].values())),
        f"{result['free_macs']:.1%}",
        f"{result['trace_seconds']:.1f}",
        *(_error(result.get(key)) for key in ("cut_error", "cut_error_double", "onnx_error")),
        str(len(result["seeds"])),
        failure,
    )


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def document(library: Library, machine: Cell, results: list[Cell]) -> str:
    """Every stored row, in the order of the library's names."""
    name, results = library.name, sorted(results, key=lambda result: library.names.index(result["model"]))
    failed = sum("failure" in result for result in results)
    seconds = sum(result["seconds"] for result in results)
    threads = " or ".join(map(str, sorted({result["threads"] for result in results})))
    options = "" if name == "torchvision" else f" --library {name} --seeds {' '.join(map(str, results[0]['seeds']))}"
    return f"""# Coverage of {name}

{len(results)} of {len(library.names)} {library.title}, {failed} of which failed:

```sh
python -m benchmarks.coverage{options}
```

Every network has random weights and loses 25 to 75 % of the units of every group at once, for {_seeds(results)} random
keeps; it must then equal the masked network to 1e-5 in float32 (below 30 million parameters also to 1e-12 in float64),
have the predicted number of parameters, take a step of SGD, and give an ONNX file that onnxruntime runs to 1e-4.
"Pinned" counts the channels that may not go, those of inputs and outputs excepted; "MACs free" is the share of all
layers' multiply-adds that lies in layers of whose weight at least one axis can be cut; errors are the worst, relative
to the largest output, of the cut against the masked network and of the ONNX file against the cut network.

{table(results)}

Measured in {seconds / 60:.0f} minutes on {machine["cpu"]}, {machine["cores"]:g} cores, torch {machine["torch"]} with
{threads} threads, onnxruntime {machine["onnxruntime"]}; seconds are those of a machine that did other work too. Raw
results, with the reasons of what is pinned, are in `benchmarks/results/{library.results.name}`.
"""


def _seeds(results: list[Cell]) -> str:
    return " or ".join(map(str, sorted({len(result["seeds"]) for result in results})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", default="torchvision", choices=LIBRARIES)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    library = LIBRARIES[args.library]
    cells = [{"model": name, "seeds": args.seeds} for name in args.models or library.names]
    print(table(run_cells(library.results, cells, lambda cell: measure(cell, library))))
    library.document.write_text(document(library, *stored(library.results)))


if __name__ == "__main__":
    main()
