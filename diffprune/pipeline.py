"""The whole path in memory: search under a budget, exact cut, recovery, and every number measured on the way."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import export
import surgery
from diffprune.budget import Budget, require_reachable
from diffprune.bundles import Bundle
from diffprune.choosing import Scores, choose, score_
from diffprune.closed import staying_closed
from diffprune.compensate import compensate_
from diffprune.detectors import lost
from diffprune.errors import BadBudget, BadData
from diffprune.gains import gains
from diffprune.gated import attach
from diffprune.gates import Gate
from diffprune.hints import hinted, hinting
from diffprune.recover import accuracy, recalibrate_
from diffprune.stopwatch import stopwatch
from diffprune.training import Batches, Event, Recipe, ending, endless, fit_, logits, require_labels, unpack
from surgery import ExampleInputs
from surgery.cut import copied

CALIBRATION = 1000
"""Images that the cut layers are fitted to; twice as many gain 0.2 points (docs/method.md)."""

SCORED = 256
"""Of these images, those that the gain of units is measured on: 32 places of each are enough."""

ELEMENTS = 1 << 24
"""Values that these images may have together: 1000 of CIFAR's, 111 of 3 x 224 x 224."""


@dataclass(frozen=True, eq=False)
class Result:
    """`model` is dense, small and trained; `keep` what was kept per group; `report` every number on the way."""

    model: nn.Module
    keep: dict[str, Tensor]
    report: dict[str, Any]


def compress(
    model: nn.Module,
    train: Batches,
    val: Batches,
    *,
    budget: Budget,
    example_inputs: ExampleInputs | None = None,
    epochs: float = 5.0,
    recipe: Recipe | None = None,
    gate: str | Gate = "diffprune",
    bundles: Iterable[Bundle] | Callable[[surgery.ChannelGraph], Iterable[Bundle]] = (),
    scores: Scores = gains,
    round_to: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    threads: int = 1,
    on_event: Event | None = None,
) -> Result:
    """A smaller network that keeps `budget` of the dense cost and imitates `model`, which is left alone.

    `train` yields (inputs, labels) or inputs alone (then the parent's answers are the only target), `val` yields
    (inputs, labels); both are iterated repeatedly. `epochs` counts search and recovery together; with 0 units are
    chosen by their score per cost and the rest is fitted, without any training. Widths stay multiples of `round_to`
    where they were: 1 by default, so that shares of MACs and parameters are met closely (where speed counts give 4 or
    more: onnxruntime runs single channels slowly), and under a budget of speed-up the step that is probed here
    (`export.default_step()` is right for onnxruntime on this CPU). Such a budget is met as measured by onnxruntime on
    this CPU with `threads` threads and one image at a time: the report has the interval.
    Units in one of the `bundles` stay or go together; `bundles=branches` drops whole residual branches: they stay zero,
    and ONNX files go without them. `scores` tells what each unit is worth before the search: `gains` by default,
    `criterion_scores` for one of torch-pruning's, or a function of yours from (network, graph, images) to a tensor of
    shape (units,). The network must return logits, shape (N, classes). Frozen parameters stay as they are; if all are
    frozen, every step goes to the gates.
    Raises NothingToCut, BudgetUnreachable, BadData, TrainingDiverged, surgery.NotEqual (never expected) and what
    tracing raises.
    """
    tell = on_event or (lambda event: None)
    recipe = recipe or Recipe()
    started = time.perf_counter()
    if epochs < 0 or (round_to is not None and round_to < 1):
        raise BadBudget(
            f"epochs={epochs} and round_to={round_to}; at least 0 and 1 are asked",
            at="compress",
            effect="nothing was started",
            fix="give epochs >= 0 and round_to >= 1",
        )
    _refuse_iterators(train=train, val=val)
    torch.manual_seed(seed)
    parent = copied(model).to(device).eval()
    images, batches = _calibration(train, parent, torch.device(device))
    example = images[:2] if example_inputs is None else _moved(example_inputs, device)
    graph = surgery.trace(parent, example)
    gated = attach(parent, graph, gate=gate, bundles=bundles(graph) if callable(bundles) else bundles)
    timed = budget.kind == "speedup"
    step = round_to or (export.probe_step(threads=threads).multiple if timed else 1)
    total = max(1, round(epochs * _length(train))) if epochs else 0
    with tempfile.TemporaryDirectory() as folder:
        watch = None
        if timed:
            watch = stopwatch(parent, graph, example, Path(folder), step=step, threads=threads, tell=tell)
            gated.size = watch.size
            watch.require_reachable(budget, step, gated.gate_of)
        else:
            require_reachable(budget, gated.size, step, gated.gate_of)
        score_(gated, parent, images[:SCORED], scores, budget)
        dense_accuracy, examples = accuracy(parent, val)
        tell({"phase": "dense", "accuracy": dense_accuracy})
        choice = choose(gated, parent, batches, budget, recipe, round_to=step, total=total, watch=watch, tell=tell)
    warnings = choice.warnings
    for text in warnings:
        tell({"phase": "warning", "text": text})

    keep = choice.keep
    masked, small = surgery.mask(choice.network, graph, keep), surgery.cut(choice.network, graph, keep)
    error = surgery.check_equal(masked, small, example)
    stages = {"dense": dense_accuracy, "after_cut": accuracy(small, val)[0]}
    reached = budget.left(gated.size, gated.size.flat(keep))
    tell({"phase": "cut", "accuracy": stages["after_cut"], "reached": reached, "masked_vs_cut": error})
    with staying_closed(small, graph, keep):
        compensate_(small, parent, graph, keep, images)
        recalibrate_(small, train)
        stages["after_recalibration"] = stages["pruned"] = accuracy(small, val)[0]
        tell({"phase": "recalibrate", "accuracy": stages["after_recalibration"]})
        if total:
            steps = range(choice.search_steps, total)
            hints = hinting(small, parent, hinted(graph), graph.checked(keep)[1]) if recipe.hints else nullcontext()
            with hints as hint:
                fit_(
                    small, batches, recipe, steps=steps, total=total, parent=parent, hint=hint, phase="recover",
                    on_event=tell,
                )  # fmt: skip
            stages["pruned"] = accuracy(small, val)[0]
            for text in lost(stages["after_recalibration"], stages["pruned"], examples):
                warnings.append(text)
                tell({"phase": "warning", "text": text})
    small.eval()
    tell({"phase": "done", "accuracy": stages["pruned"]})

    dense, cut = gated.size.dense, gated.size.of(keep)
    report = {
        "accuracy": {**stages, "examples": examples},
        "macs": {"dense": dense.macs, "pruned": cut.macs},
        "params": {"dense": dense.params, "pruned": cut.params},
        "equivalence": {"masked_vs_cut": error},
        "budget": choice.budget,
        "warnings": warnings,
        "groups": _groups(gated.size, keep),
        "pinned": [{"where": p.where, "channels": len(p.channels), "reason": p.reason} for p in graph.pinned],
        "training": {
            "steps": total,
            "search_steps": choice.search_steps,
            "frozen_params": sum(p.numel() for p in parent.parameters() if not p.requires_grad),
            "seed": seed,
            "device": str(device),
            "gate": gate if isinstance(gate, str) else type(gate).__name__,
            **vars(recipe),
        },
        "seconds": time.perf_counter() - started,
    }
    return Result(small, keep, report)


def _calibration(train: Batches, parent: nn.Module, device: torch.device) -> tuple[Tensor, Iterator[Any]]:
    """Inputs of the first batches, and all batches, these first: images that are looked at are trained on in turn.

    CALIBRATION inputs, or as many as ELEMENTS allow, of one size, at least one batch and at most one epoch. Raises
    BadData, for labels that the network has no output for as well, and for a network that writes into its input.
    """
    epoch, classes = iter(train), 0
    seen: list[Any] = []
    parts: list[Tensor] = []
    for batch in epoch:
        inputs, labels = unpack(batch, device)
        classes = classes or _classes(parent, inputs)
        if labels is not None:
            require_labels(labels, len(inputs), classes)
        seen.append(batch)
        if parts and inputs.shape[1:] != parts[0].shape[1:]:
            break
        parts.append(inputs)
        wanted = min(CALIBRATION, ELEMENTS // max(inputs[0].numel(), 1))
        if sum(map(len, parts)) >= wanted:
            break
    if not parts:
        raise _bad_data("the training data is empty", "give at least one training batch")
    return torch.cat(parts)[: max(wanted, len(parts[0]))], chain(seen, epoch, endless(train))


def _classes(parent: nn.Module, inputs: Tensor) -> int:
    """How many the network tells apart. Raises BadData if it writes into its input: others read the same images."""
    given = inputs[:2].clone()
    with torch.no_grad(), surgery.evaluating(parent):
        classes = logits(parent(given)).shape[1]
    if not ((given == inputs[:2]) | (given != given)).all():
        raise _bad_data("the network writes into its input", "write x = x - mean in forward in place of x.sub_(mean)")
    return classes


def _moved(example: ExampleInputs, device: str | torch.device) -> ExampleInputs:
    moved: ExampleInputs = tree_map_only(Tensor, lambda value: value.to(device), example)
    return moved


def _refuse_iterators(**batches: Batches) -> None:
    """Both are read several times; what can be read only once would be found empty in the middle of a run."""
    for name, given in batches.items():
        if isinstance(given, Iterator):
            raise _bad_data(
                f"{name} is a {type(given).__name__}, which can be read only once",
                "give a list, a DataLoader or another object that can be iterated again",
            )


def _bad_data(fact: str, fix: str) -> BadData:
    return BadData(fact, at="compress", effect="nothing was started", fix=fix)


def _length(train: Batches) -> int:
    """Batches in an epoch. Loaders of iterable data sets have a __len__ that raises."""
    try:
        return len(train)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in ending(train))


def _groups(size: surgery.SizeModel, keep: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Per group what was kept, and the share of the dense MACs that would go with it alone."""
    whole = size.dense.macs
    rows = []
    for group in size.graph.groups:
        rows.append(
            {
                "name": group.name,
                "kind": group.kind,
                "units": group.units,
                "kept": int(keep[group.name].sum()),
                "macs_share": 1 - float(size.macs(size.without(group))) / whole,
            }
        )
    return rows
