"""The whole path in memory: search under a budget, exact cut, recovery, and every number measured on the way."""

import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import surgery
from diffprune.budget import Budget
from diffprune.bundles import Bundle
from diffprune.calibration import calibration, length, refuse_iterators
from diffprune.choosing import Choice, Scores, choose, score_
from diffprune.closed import staying_closed
from diffprune.compensate import compensate_
from diffprune.detectors import lost
from diffprune.errors import BadBudget
from diffprune.feeding import Batches
from diffprune.gains import gains
from diffprune.gated import attach
from diffprune.gates import Gate
from diffprune.hints import hinted, hinting
from diffprune.landing import require_reachable
from diffprune.recover import accuracy, recalibrate_
from diffprune.stopwatch import stopwatch
from diffprune.target import probe, target
from diffprune.training import Event, Recipe, fit_
from surgery import ExampleInputs, SizeModel
from surgery.rebuilding import copied

SCORED = 256
"""Of the images of calibration, those that the gain of units is measured on: 32 places of each are enough."""


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
    latency_batch: int = 1,
    latency_device: str = "cpu",
    latency_precision: str = "fp32",
    on_event: Event = lambda event: None,
) -> Result:
    """A smaller network that keeps `budget` of the dense cost and imitates `model`, which is left alone.

    `train` yields (inputs, labels) or inputs alone (then the parent's answers are the only target), `val` yields
    (inputs, labels); both are iterated repeatedly. `epochs` counts search and recovery together; with 0 units are
    chosen by their score per cost and the rest is fitted, without any training. Widths stay multiples of `round_to`
    where they were: 1 by default, so that shares of MACs and parameters are met closely (where speed counts give 4 or
    more: onnxruntime runs single channels slowly), and under a budget of speed-up the step that is probed here
    (`export.default_step()` is right for onnxruntime on this CPU). Such a budget is met as measured by onnxruntime on
    this CPU with `threads` threads and `latency_batch` images at once, or, if `latency_device` is "cuda", by torch's
    CUDA graphs on this GPU in `latency_precision` ("fp32", "tf32" or "fp16"): the report has the interval.
    Units in one of the `bundles` stay or go together; `bundles=branches` drops whole residual branches: they stay zero,
    and ONNX files go without them. `scores` tells what each unit is worth before the search: `gains` by default,
    `criterion_scores` for one of torch-pruning's, or a function of yours from (network, graph, images) to a tensor of
    shape (units,). The network must return logits, shape (N, classes). Frozen parameters stay as they are; if all are
    frozen, every step goes to the gates.
    Raises NothingToCut, BudgetUnreachable, BadData, TrainingDiverged, surgery.NotEqual (never expected) and what
    tracing raises.
    """
    recipe = recipe or Recipe()
    started = time.perf_counter()
    asked_of = target(latency_device, threads=threads, batch=latency_batch, precision=latency_precision)
    _require_numbers(epochs, round_to)
    refuse_iterators(train=train, val=val)
    torch.manual_seed(seed)
    parent = copied(model).to(device).eval()
    images, batches = calibration(train, parent, torch.device(device))
    example = images[:2] if example_inputs is None else _moved(example_inputs, device)
    graph = surgery.trace(parent, example)
    probed = probe(asked_of) if budget.kind == "speedup" and not round_to else None
    step = round_to or (probed.multiple if probed else 1)
    total = max(1, round(epochs * length(train))) if epochs else 0

    def cut() -> tuple[nn.Module, SizeModel, Choice, float, tuple[float, int]]:
        """In a scope of its own, so that the gated and the masked copy are gone when the rest is trained."""
        gated = attach(parent, graph, gate=gate, bundles=bundles(graph) if callable(bundles) else bundles)
        with tempfile.TemporaryDirectory() as folder:
            watch = None
            if budget.kind == "speedup":
                watch = stopwatch(parent, graph, example, Path(folder), step=step, settings=asked_of, tell=on_event)
                gated.size = watch.size
                watch.require_reachable(budget, step, gated.gate_of)
            else:
                require_reachable(budget, gated.size, step, gated.gate_of)
            score_(gated, parent, images[:SCORED], scores, budget)
            dense = accuracy(parent, val)
            on_event({"phase": "dense", "accuracy": dense[0]})
            network, choice = choose(
                gated, parent, batches, budget, recipe, round_to=step, total=total, watch=watch, tell=on_event
            )
        small = surgery.cut(network, graph, choice.keep)
        error = surgery.check_equal(surgery.mask(network, graph, choice.keep), small, example)
        return small, gated.size, choice, error, dense

    small, size, choice, error, (dense_accuracy, examples) = cut()
    keep, warnings = choice.keep, choice.warnings + ([probed.doubt] if probed and probed.doubt else [])
    for text in warnings:
        on_event({"phase": "warning", "text": text})
    stages = {"dense": dense_accuracy, "after_cut": accuracy(small, val)[0]}
    reached = budget.left(size, size.flat(keep))
    on_event({"phase": "cut", "accuracy": stages["after_cut"], "reached": reached, "masked_vs_cut": error})
    with staying_closed(small, graph, keep):
        if recipe.compensate:
            compensate_(small, parent, graph, keep, images)
        recalibrate_(small, train)
        stages["after_recalibration"] = stages["pruned"] = accuracy(small, val)[0]
        on_event({"phase": "recalibrate", "accuracy": stages["after_recalibration"]})
        if total:
            steps = range(choice.search_steps, total)
            hints = hinting(small, parent, hinted(graph), graph.checked(keep)[1]) if recipe.hints else nullcontext()
            with hints as hint:
                fit_(
                    small, batches, recipe, steps=steps, total=total, parent=parent, hint=hint, phase="recover",
                    on_event=on_event,
                )  # fmt: skip
            stages["pruned"] = accuracy(small, val)[0]
            for text in lost(stages["after_recalibration"], stages["pruned"], examples):
                warnings.append(text)
                on_event({"phase": "warning", "text": text})
    small.eval()
    on_event({"phase": "done", "accuracy": stages["pruned"]})

    dense, left = size.dense, size.of(keep)
    report = {
        "accuracy": {**stages, "examples": examples},
        "macs": {"dense": dense.macs, "pruned": left.macs},
        "params": {"dense": dense.params, "pruned": left.params},
        "equivalence": {"masked_vs_cut": error},
        "budget": choice.budget,
        "warnings": warnings,
        "groups": _groups(size, keep),
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


def _require_numbers(epochs: float, round_to: int | None) -> None:
    if not 0 <= epochs < inf or (round_to is not None and round_to < 1):
        raise BadBudget(
            f"epochs={epochs} and round_to={round_to}; at least 0 and 1 are asked",
            at="compress",
            effect="nothing was started",
            fix="give epochs >= 0 and round_to >= 1",
        )


def _moved(example: ExampleInputs, device: str | torch.device) -> ExampleInputs:
    moved: ExampleInputs = tree_map_only(Tensor, lambda value: value.to(device), example)
    return moved


def _groups(size: SizeModel, keep: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Per group what was kept, and the share of the dense MACs that would go with it alone."""
    macs = Budget(macs=1.0)
    return [
        {
            "name": group.name,
            "kind": group.kind,
            "units": group.units,
            "kept": int(keep[group.name].sum()),
            "macs_share": macs.saved(size, group),
        }
        for group in size.graph.groups
    ]
