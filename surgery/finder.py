"""`trace`: from a network to its channel graph, with every doubt proven or pinned."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from surgery.capture import Captured, ExampleInputs, capture
from surgery.cut import cut
from surgery.errors import SurgeryError
from surgery.graph import ChannelGraph
from surgery.observe import Axis, Observed, observe
from surgery.units import AxisKey, build, resolve

FINDERS = ("names", "torch-pruning")


def trace(model: nn.Module, example_inputs: ExampleInputs, *, finder: str = "names") -> ChannelGraph:
    """Which channels of `model` live or die together, and which are pinned and why.

    `example_inputs` is what the forward takes: a tensor, a tuple of positional or a mapping of keyword inputs; shapes
    and the path taken through the forward are those of the example. `finder` is "names" (default: runs the captured
    network on channel names) or "torch-pruning" (its DependencyGraph, as a second opinion). The model is unchanged.
    Raises CaptureFailed.
    """
    if finder not in FINDERS:
        raise ValueError(f"finder is one of {', '.join(FINDERS)}; got {finder!r}")
    captured = capture(model, example_inputs)
    pins: dict[str, str] = {}
    seen, graph = _graph(captured, model, pins)
    for doubt in _doubts(seen, graph):
        failure = _disproof(model, example_inputs, captured, seen, graph, doubt)
        if failure:
            pins[doubt] = f"{doubt}: {failure}"
    if pins:
        seen, graph = _graph(captured, model, pins)
    if finder == "torch-pruning":
        from surgery.second_finder import second_graph

        return second_graph(model, example_inputs, graph)
    return graph


def _graph(captured: Captured, model: nn.Module, pins: dict[str, str]) -> tuple[Observed, ChannelGraph]:
    seen = observe(captured, model, pins)
    axes, reasons = resolve(seen)
    label = seen.names.classes()
    inputs = {name: int(label[channel]) for name, channel in seen.inputs.items()}
    return seen, build(axes, reasons, seen.layers, model, inputs)


def _doubts(seen: Observed, graph: ChannelGraph) -> list[str]:
    """The suspicions that concern free channels, each once."""
    return [doubt for doubt in dict.fromkeys(text for _, text in seen.suspicions) if _suspects(seen, graph, doubt)]


def _suspects(seen: Observed, graph: ChannelGraph, doubt: str) -> dict[str, Tensor]:
    """Per group, which units a suspicion concerns."""
    label = seen.names.classes()
    accused = torch.cat([label[names[names >= 0]] for names, text in seen.suspicions if text == doubt])
    found = {}
    for group in graph.groups:
        slot = group.slots[0]
        classes = label[seen.axes[slot.tensor, slot.axis].names[slot.positions[:, 0]]]
        hit = torch.isin(classes, accused)
        if hit.any():
            found[group.name] = hit
    return found


def _disproof(
    model: nn.Module, example_inputs: ExampleInputs, captured: Captured, seen: Observed, graph: ChannelGraph, doubt: str
) -> str | None:
    """Cut every third accused unit, trace again: every axis must see the names it saw before. None, or what failed."""
    keep = {}
    for name, hit in _suspects(seen, graph, doubt).items():
        accused = hit.nonzero().squeeze(1)
        keep[name] = torch.ones(len(hit), dtype=torch.bool)
        if len(hit) > 1:
            keep[name][accused[1::3] if len(accused) > 1 else accused] = False
    try:
        small = cut(model, graph, keep)
        again = observe(capture(small, example_inputs), small)
    except SurgeryError as error:
        return f"a cut network does not run ({str(error).splitlines()[0]})"
    if again.outputs != seen.outputs:
        return "a cut network has outputs of another shape"
    before, after = resolve(seen)[0], resolve(again)[0]
    alive = graph.kept(graph.complete(keep))
    return None if _same_names(before, after, alive) else "a cut network reads other channels"


def _same_names(before: Mapping[AxisKey, Axis], after: Mapping[AxisKey, Axis], alive: Mapping[AxisKey, Tensor]) -> bool:
    """Is there a one-to-one map between the classes of both, valid on every axis?"""
    if before.keys() != after.keys():
        return False
    pairs = []
    for key, axis in before.items():
        old = axis.names[alive[key]] if key in alive else axis.names
        new = after[key].names
        if old.shape != new.shape:
            return False
        pairs.append(torch.stack((old, new)))
    unique = torch.unique(torch.cat(pairs, dim=1), dim=1)
    return bool(unique.shape[1] == len(unique[0].unique()) == len(unique[1].unique()))
