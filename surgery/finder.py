"""`trace`: from a network to its channel graph, with every doubt proven or pinned."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from surgery.capture import Captured, ExampleInputs, capture
from surgery.check import check_equal
from surgery.cut import cut, mask
from surgery.errors import NotEqual, SurgeryError
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
    seen, graph = _graph(captured, model, {})

    def failure(doubts: list[str]) -> str | None:
        return _disproof(model, example_inputs, seen, graph, doubts)

    doubts = _doubts(seen, graph)
    together = failure(doubts) if doubts else None
    if together:
        alone = {doubt: failure([doubt]) for doubt in doubts} if len(doubts) > 1 else {}
        guilty = {doubt: text for doubt, text in alone.items() if text} or dict.fromkeys(doubts, together)
        seen, graph = _graph(captured, model, {doubt: f"{doubt}: {text}" for doubt, text in guilty.items()})
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
    return [doubt for doubt in dict.fromkeys(text for _, text in seen.suspicions) if _suspects(seen, graph, [doubt])]


def _suspects(seen: Observed, graph: ChannelGraph, doubts: list[str]) -> dict[str, Tensor]:
    """Per group, which units the suspicions concern."""
    label = seen.names.classes()
    accused = torch.cat([label[names[names >= 0]] for names, text in seen.suspicions if text in doubts])
    found = {}
    for group in graph.groups:
        slot = group.slots[0]
        classes = label[seen.axes[slot.tensor, slot.axis].names[slot.positions[:, 0]]]
        hit = torch.isin(classes, accused)
        if hit.any():
            found[group.name] = hit
    return found


def _disproof(
    model: nn.Module, example_inputs: ExampleInputs, seen: Observed, graph: ChannelGraph, doubts: list[str]
) -> str | None:
    """Cut every third accused unit: a new trace must see the same names, the network compute the same. None if so."""
    keep = {}
    for name, hit in _suspects(seen, graph, doubts).items():
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
    if not _same_names(before, after, alive):
        return "a cut network reads other channels"
    try:
        check_equal(mask(model, graph, keep), small, example_inputs)
    except NotEqual as error:
        return f"a cut network could not be shown to compute the same ({str(error).splitlines()[0]})"
    return None


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
