"""What can be cut from a network, before any training."""

from typing import Any

import torch
from rich.table import Table

import surgery
from diffprune.budget import Budget, least_share
from diffprune.errors import BadData
from diffprune.models import load_model


def inspection(
    spec: str, weights: str | None, shape: tuple[int, ...], *, macs: float | None, params: float | None, round_to: int
) -> list[Any]:
    """Lines and tables for a terminal: groups with their shares, what is pinned and why, how far budgets reach."""
    model = load_model(spec, weights=weights)
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), surgery.evaluating(model):
            model(example)
    except Exception as error:
        raise BadData(
            f"the network does not take images of {shape}: {str(error).splitlines()[0]}",
            at=spec,
            effect="nothing was inspected",
            fix="give the image's channels, height and width with --input",
        ) from error
    graph = surgery.trace(model, example)
    size = surgery.SizeModel(graph)
    dense = size.dense
    table = Table("group", "kind", "units", "MACs", "parameters")
    for column in table.columns[2:]:
        column.justify = "right"
    for group in graph.groups:
        rest = torch.cat([torch.full((g.units,), float(g is not group)) for g in graph.groups])
        without = float(size.macs(rest)) / dense.macs, float(size.params(rest)) / dense.params
        table.add_row(group.name, group.kind, str(group.units), *(f"{1 - share:.1%}" for share in without))
    pinned = Table("pinned", "channels", "reason")
    for pin in graph.pinned:
        pinned.add_row(pin.where, str(len(pin.channels)), pin.reason)
    lines: list[Any] = [f"{spec}: {dense.params:,} parameters, {dense.macs:,} MACs per image of {shape}"]
    lines += [table] if graph.groups else ["nothing can be cut"]
    lines += [pinned]
    if graph.groups:
        for budget in (Budget(macs=macs or 1.0), Budget(params=params or 1.0)):
            least = least_share(budget, size, round_to)
            asked = macs if budget.kind == "macs" else params
            verdict = "" if asked is None else f"; {asked:g} is {'reachable' if least <= asked else 'out of reach'}"
            lines.append(f"{budget.kind}: can go down to {least:.1%} of the dense network{verdict}")
    return lines
