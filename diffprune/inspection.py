"""What can be cut from a network, before any training."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table

import surgery
from diffprune.budget import Budget
from diffprune.landing import least_share
from diffprune.models import load_model
from diffprune.preparation import alive, answer
from diffprune.report import count
from diffprune.stopwatch import stopwatch
from diffprune.tables import add_row, table
from diffprune.timed import TimedSize
from diffprune.training import Event
from export import Comparison, Settings
from export.settings import ONE_THREAD


def inspection(
    spec: str,
    weights: str | None,
    shape: tuple[int, ...],
    *,
    classes: int | None = None,
    macs: float | None = None,
    params: float | None = None,
    speedup: float | None = None,
    round_to: int = 1,
    asked_of: Settings = ONE_THREAD,
    tell: Event = lambda event: None,
) -> list[Any]:
    """Lines and tables for a terminal: groups with their shares, what is pinned and why, how far budgets reach.

    Only if a `speedup` is asked is anything measured, as `asked_of` says: what each group takes of the time, and the
    fastest network.
    """
    asked = (macs, params)
    budgets = (Budget(macs=1.0 if macs is None else macs), Budget(params=1.0 if params is None else params))
    faster = None if speedup is None else Budget(speedup=speedup)
    model = load_model(spec, weights=weights, num_classes=classes)
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    fix = "give the image's channels, height and width with --input"
    answer(model, example, at=spec, effect="nothing was inspected", fix=fix)
    graph = surgery.trace(model, example)
    size = surgery.SizeModel(graph)
    head = f"{spec}: {count(size.dense.params)} parameters, {count(size.dense.macs)} MACs per image of {shape}"
    lines: list[Any] = [head, ""]
    if graph.groups:
        lines += [_groups(size), ""]
    if graph.pinned:
        lines += [_pinned(graph), ""]
    if not graph.groups:
        return [*lines, "nothing can be cut: every channel is pinned, and no budget below 1 can be reached"]
    lines += [_reach(budget, share, size, round_to) for budget, share in zip(budgets, asked, strict=True)]
    if faster:
        with TemporaryDirectory() as folder:
            model = model if weights else alive(model)
            watch = stopwatch(model, graph, example, Path(folder), step=round_to, settings=asked_of, tell=tell)
            lines[2] = _groups(watch.size)
            tell({"phase": "measure"})
            lines.append(_fastest(faster, watch.fastest(round_to), round_to))
    return lines


def _groups(size: surgery.SizeModel) -> Table:
    """Per group what share of MACs and parameters, and of the time where it is known, would go with it alone."""
    costs = {"MACs": Budget(macs=1.0), "parameters": Budget(params=1.0)}
    if isinstance(size, TimedSize):
        costs["time"] = Budget(speedup=2.0)
    drawn = table("group", "kind", "units", *costs, right=range(2, 3 + len(costs)))
    for group in size.graph.groups:
        gone = (f"{100 * budget.saved(size, group):.1f} %" for budget in costs.values())
        add_row(drawn, group.name, group.kind, count(group.units), *gone)
    return drawn


def _pinned(graph: surgery.ChannelGraph) -> Table:
    drawn = table("pinned", "channels", "reason", right=range(1, 2))
    for pin in graph.pinned:
        add_row(drawn, pin.where, count(len(pin.channels)), pin.reason)
    return drawn


def _reach(budget: Budget, asked: float | None, size: surgery.SizeModel, round_to: int) -> str:
    """How far a budget can go."""
    least = least_share(budget, size, round_to)
    text = f"{budget.kind}: {_up(least)} of the dense network can be reached, widths being multiples of {round_to}"
    if round_to > 1:
        text += f", and {_up(least_share(budget, size))} with any widths"
    return text if asked is None else f"{text}; {asked:g} is {'within' if least <= asked else 'out of'} reach"


def _fastest(asked: Budget, found: Comparison, round_to: int) -> str:
    """How far a budget of speed-up can go here."""
    interval = f"interval {found.low:.2f} to {found.high:.2f}"
    text = (
        f"speed-up: {found.speedup:.2f}x was measured here, {interval}, of the smallest network in steps of {round_to}"
    )
    return f"{text}; {asked.asked:g} is {'within' if found.speedup >= asked.asked else 'out of'} reach"


def _up(share: float) -> str:
    """Rounded up, so that what is shown can be asked for."""
    return f"{math.ceil(1000 * share) / 1000:.3f}"
