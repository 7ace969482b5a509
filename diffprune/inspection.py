"""What can be cut from a network, before any training."""

import math
from typing import Any

import torch
from rich.table import Table

import surgery
from diffprune.budget import Budget, least_share
from diffprune.errors import BadData
from diffprune.models import load_model
from diffprune.preparation import answer, first_line
from diffprune.report import count
from diffprune.tables import add_row, table


def inspection(
    spec: str,
    weights: str | None,
    shape: tuple[int, ...],
    *,
    classes: int | None = None,
    macs: float | None = None,
    params: float | None = None,
    round_to: int = 1,
) -> list[Any]:
    """Lines and tables for a terminal: groups with their shares, what is pinned and why, how far budgets reach."""
    asked = (macs, params)
    budgets = (Budget(macs=1.0 if macs is None else macs), Budget(params=1.0 if params is None else params))
    model = load_model(spec, weights=weights, num_classes=classes)
    graph = surgery.trace(model, _example(model, spec, shape))
    size = surgery.SizeModel(graph)
    head = f"{spec}: {count(size.dense.params)} parameters, {count(size.dense.macs)} MACs per image of {shape}"
    lines: list[Any] = [head, ""]
    if graph.groups:
        lines += [_groups(size), ""]
    if graph.pinned:
        lines += [_pinned(graph), ""]
    if not graph.groups:
        return [*lines, "nothing can be cut: every channel is pinned, and no budget below 1 can be reached"]
    return [*lines, *(_reach(budget, share, size, round_to) for budget, share in zip(budgets, asked, strict=True))]


def _example(model: torch.nn.Module, spec: str, shape: tuple[int, ...]) -> torch.Tensor:
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        answer(model, images)
    except Exception as error:
        raise BadData(
            f"the network does not take images of {shape}: {first_line(error)}",
            at=spec,
            effect="nothing was inspected",
            fix="give the image's channels, height and width with --input",
        ) from error
    return images


def _groups(size: surgery.SizeModel) -> Table:
    """Per group what share of MACs and parameters would go with it alone."""
    drawn = table("group", "kind", "units", "MACs", "parameters", right=range(2, 5))
    dense = size.dense
    for group in size.graph.groups:
        rest = size.without(group)
        gone = 1 - float(size.macs(rest)) / dense.macs, 1 - float(size.params(rest)) / dense.params
        add_row(drawn, group.name, group.kind, count(group.units), *(f"{100 * share:.1f} %" for share in gone))
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


def _up(share: float) -> str:
    """Rounded up, so that what is shown can be asked for."""
    return f"{math.ceil(1000 * share) / 1000:.3f}"
