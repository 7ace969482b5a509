"""The whole path in memory: search under a budget, exact cut, recovery, and every number measured on the way."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import surgery
from diffprune.budget import Budget
from diffprune.bundles import Bundles
from diffprune.calibration import calibration, length, refuse_iterators
from diffprune.choosing import Choice, Scores, choose, score_
from diffprune.closed import staying_closed
from diffprune.compensate import compensate_
from diffprune.detectors import lost
from diffprune.errors import BadBudget
from diffprune.feeding import Batches
from diffprune.gains import gains
from diffprune.gated import GatedModel, attach
from diffprune.gates import Gate
from diffprune.hints import hinted, hinting
from diffprune.landing import require_reachable
from diffprune.recover import accuracy, recalibrate_
from diffprune.stopwatch import stopwatch
from diffprune.target import probe, require_device, target
from diffprune.training import Event, Recipe, fit_
from export import Settings
from export.settings import ONE_THREAD
from surgery import ChannelGraph, ExampleInputs, SizeModel
from surgery.capture import own_random_state
from surgery.rebuilding import copied

MOST_EPOCHS = 1_000_000

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
    bundles: Bundles = (),
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
    Units in one of the `bundles` stay or go together, and are not rounded; `bundles=branches` drops whole residual
    branches: they stay zero, and ONNX files go without them. `scores` tells what each unit is worth before the search:
    `gains` by default, `criterion_scores` for one of torch-pruning's, or a function of yours from (network, graph,
    images) to a tensor of shape (units,). The network must return logits, shape (N, classes). Frozen parameters stay as
    they are; if all are frozen, every step goes to the gates. Training that ends clearly below where the fit after the
    cut began it is undone, with a warning.
    Raises NothingToCut, BudgetUnreachable, BadData, TrainingDiverged, surgery.NotEqual (never expected) and what
    tracing raises.
    """
    recipe, started = recipe or Recipe(), time.perf_counter()
    asked_of = target(latency_device, threads=threads, batch=latency_batch, precision=latency_precision)
    _require_numbers(epochs, round_to, seed)
    _require_measured(budget, asked_of)
    refuse_iterators(train=train, val=val)
    require_device(device, "device")
    parent = copied(model).to(device).eval()
    with own_random_state(parent), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        images, batches = calibration(train, parent, torch.device(device))
        example = images[:2] if example_inputs is None else _moved(example_inputs, device)
        graph = surgery.trace(parent, example)
        probed = probe(asked_of) if budget.kind == "speedup" and not round_to else None
        step = round_to or (probed.multiple if probed else 1)
        total = max(1, round(epochs * length(train))) if epochs else 0
        job = Job(parent, graph, example, images, batches, train, val, budget, recipe, asked_of, step, total, on_event)
        cut = _cut(job, attach(parent, graph, gate=gate, bundles=bundles), scores)
        warnings = cut.choice.warnings + ([probed.doubt] if probed and probed.doubt else [])
        for text in warnings:
            on_event({"phase": "warning", "text": text})
        stages, losses = _recovered(job, cut)
    on_event({"phase": "done", "accuracy": stages["pruned"]})
    trained = {
        "steps": total,
        "search_steps": cut.choice.search_steps,
        "frozen_params": sum(p.numel() for p in parent.parameters() if not p.requires_grad),
        "seed": seed,
        "device": str(device),
        "gate": gate if isinstance(gate, str) else type(gate).__name__,
        **vars(recipe),
    }
    report = {
        "accuracy": {"dense": cut.dense, **stages, "examples": cut.examples},
        **_sizes(cut, graph),
        "equivalence": {"masked_vs_cut": cut.error},
        "budget": cut.choice.budget,
        "warnings": warnings + losses,
        "training": trained,
        "seconds": time.perf_counter() - started,
    }
    return Result(cut.small, cut.choice.keep, report)


@dataclass(frozen=True, eq=False)
class Job:
    """What is asked of a `compress`, and what was made ready for it. `images` are for calibration, `total` the steps of
    search and recovery together."""

    parent: nn.Module
    graph: ChannelGraph
    example: ExampleInputs
    images: Tensor
    batches: Iterator[Any]
    train: Batches
    val: Batches
    budget: Budget
    recipe: Recipe
    asked_of: Settings
    step: int
    total: int
    tell: Event


@dataclass(frozen=True, eq=False)
class Cut:
    """`small` before anything was done for its accuracy, and how far it is from the masked network.

    `dense` is the parent's accuracy on `examples`.
    """

    small: nn.Module
    size: SizeModel
    choice: Choice
    error: float
    dense: float
    examples: int


def _cut(job: Job, gated: GatedModel, scores: Scores) -> Cut:
    """The gated and the masked copy are gone when it returns, before the rest is trained."""
    budget, step = job.budget, job.step
    with tempfile.TemporaryDirectory() as folder:
        watch = None
        if budget.kind == "speedup":
            watch = stopwatch(
                job.parent, job.graph, job.example, Path(folder), step=step, settings=job.asked_of, tell=job.tell
            )
            gated.size = watch.size
            watch.require_reachable(budget, step, gated.gate_of)
        else:
            require_reachable(budget, gated.size, step, gated.gate_of)
        score_(gated, job.parent, job.images[:SCORED], scores, budget)
        dense, examples = accuracy(job.parent, job.val)
        job.tell({"phase": "dense", "accuracy": dense})
        choice = choose(
            gated, job.parent, job.batches, budget, job.recipe, round_to=step, total=job.total, watch=watch,
            tell=job.tell,
        )
    small = surgery.cut(job.parent, job.graph, choice.keep)
    error = surgery.check_equal(surgery.mask(job.parent, job.graph, choice.keep), small, job.example)
    return Cut(small, gated.size, choice, error, dense, examples)


def _recovered(job: Job, cut: Cut) -> tuple[dict[str, float], list[str]]:
    """Fit and train `cut.small` in place; its accuracy on the way, and warnings."""
    small, graph, keep, recipe = cut.small, job.graph, cut.choice.keep, job.recipe
    stages = {"after_cut": accuracy(small, job.val)[0]}
    reached = job.budget.left(cut.size, cut.size.flat(keep))
    job.tell({"phase": "cut", "accuracy": stages["after_cut"], "reached": reached, "masked_vs_cut": cut.error})
    losses = []
    with staying_closed(small, graph, keep):
        if recipe.compensate:
            compensate_(small, job.parent, graph, keep, job.images)
        recalibrate_(small, job.train)
        stages["after_recalibration"] = stages["pruned"] = accuracy(small, job.val)[0]
        job.tell({"phase": "recalibrate", "accuracy": stages["after_recalibration"]})
        if job.total:
            fitted = {name: value.clone() for name, value in small.state_dict().items()}
            known = graph.checked(keep)[1]
            hints = hinting(small, job.parent, hinted(graph), known) if recipe.hints else nullcontext()
            with hints as hint:
                fit_(
                    small, job.batches, recipe, steps=range(cut.choice.search_steps, job.total), total=job.total,
                    parent=job.parent, hint=hint, phase="recover", on_event=job.tell,
                )  # fmt: skip
            trained = accuracy(small, job.val)[0]
            losses = lost(stages["after_recalibration"], trained, cut.examples)
            if losses:
                small.load_state_dict(fitted)
                job.tell({"phase": "warning", "text": losses[0]})
            else:
                stages["pruned"] = trained
    small.eval().zero_grad()
    return stages, losses


def _sizes(cut: Cut, graph: ChannelGraph) -> dict[str, Any]:
    dense, left = cut.size.dense, cut.size.of(cut.choice.keep)
    return {
        "macs": {"dense": dense.macs, "pruned": left.macs},
        "params": {"dense": dense.params, "pruned": left.params},
        "groups": _groups(cut.size, cut.choice.keep),
        "pinned": [{"where": p.where, "channels": len(p.channels), "reason": p.reason} for p in graph.pinned],
    }


def _require_numbers(epochs: float, round_to: int | None, seed: int) -> None:
    whole = round_to is None or (round_to >= 1 and hasattr(round_to, "__index__"))
    if not (0 <= epochs <= MOST_EPOCHS and whole and abs(seed) < 2**63):
        raise BadBudget(
            f"epochs={epochs}, round_to={round_to} and seed={seed}; from 0 to {MOST_EPOCHS:,} epochs, a whole round_to "
            "of at least 1 and a seed of 64 bits are asked",
            at="compress",
            effect="nothing was started",
            fix="give such numbers",
        )


def _require_measured(budget: Budget, asked_of: Settings) -> None:
    if budget.kind != "speedup" and asked_of != ONE_THREAD:
        raise BadBudget(
            f"threads, latency_batch, latency_device or latency_precision were given with a budget of {budget.kind}",
            at="compress",
            effect="nothing was started: such a budget is met without measuring a latency",
            fix="leave them out, and give them to export.compare afterwards; or give Budget(speedup=...)",
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
