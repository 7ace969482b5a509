"""From tied names to groups of units."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from surgery.graph import ChannelGraph, ChannelGroup, Layer, Pinned, Slot
from surgery.names import NEUTRAL
from surgery.observe import Axis, Observed

AxisKey = tuple[str, int]


def resolve(seen: Observed) -> tuple[dict[AxisKey, Axis], dict[int, str]]:
    """Every axis with the class of each index instead of its name, and the reason of each pinned class."""
    axes = dict(seen.axes)
    label = seen.names.classes()
    for tensor, names in seen.elements.items():
        in_layers = [axis_seen.names for (name, _), axis_seen in seen.axes.items() if name == tensor]
        axis = _single_axis(_classes(label, names))
        if in_layers:
            for used in (names, *in_layers):
                seen.names.pin(used, f"{tensor} is used by a layer and also element by element")
        elif axis is None:
            seen.names.pin(names, f"{tensor} holds channels along several axes")
        else:
            axes[tensor, axis] = Axis("carry", names.movedim(axis, 0).flatten(1)[:, 0])
    for tensor, reason in seen.opaque.items():
        for (name, _), axis_seen in axes.items():
            if name == tensor:
                seen.names.pin(axis_seen.names, reason)
    resolved = {key: Axis(axis.role, _classes(label, axis.names)) for key, axis in axes.items()}
    return resolved, seen.names.reasons(label)


def build(
    axes: Mapping[AxisKey, Axis],
    reasons: Mapping[int, str],
    layers: Mapping[str, Layer],
    model: nn.Module,
    inputs: Mapping[str, int] | None = None,
) -> ChannelGraph:
    """Units with the same slots form a group, named after its first writer; what is pinned or unread stays out."""
    places: dict[int, list[tuple[AxisKey, list[int]]]] = defaultdict(list)
    for key, axis in axes.items():
        by_class: dict[int, list[int]] = defaultdict(list)
        for position, channel in enumerate(axis.names.tolist()):
            by_class[channel].append(position)
        for channel, positions in by_class.items():
            if channel != NEUTRAL:
                places[channel].append((key, positions))
    reasons = dict(reasons)
    alike: dict[tuple[tuple[AxisKey, int], ...], list[int]] = defaultdict(list)
    for channel, where in places.items():
        if channel in reasons:
            continue
        if not any(axes[key].role == "read" for key, _ in where):
            reasons[channel] = "no layer with weights reads it"
            continue
        alike[tuple((key, len(positions)) for key, positions in where)].append(channel)
    parameters = dict(model.named_parameters())
    ranks = {name: parameter.dim() for name, parameter in parameters.items()}
    groups: list[ChannelGroup] = []
    taken: set[str] = set()
    for signature, channels in alike.items():
        lone = _lone(signature, channels, axes)
        if lone:
            reasons |= dict.fromkeys(channels, lone)
            continue
        groups.append(_group(signature, channels, places, axes, layers, ranks, taken))
    return ChannelGraph(
        groups=tuple(groups),
        pinned=tuple(_pinned(axes, reasons, layers, inputs or {})),
        layers=tuple(layers.values()),
        shapes={name: tuple(p.shape) for name, p in parameters.items()},
        buffers={name: tuple(b.shape) for name, b in model.named_buffers() if any(name == t for t, _ in axes)},
    )


def _lone(signature: tuple[tuple[AxisKey, int], ...], channels: list[int], axes: Mapping[AxisKey, Axis]) -> str | None:
    """A unit that is the whole of some axis cannot go: the axis would be emptied."""
    if len(channels) > 1:
        return None
    for key, count in signature:
        if count == len(axes[key].names):
            return f"all channels of {key[0]} are tied to each other"
    return None


def _group(
    signature: tuple[tuple[AxisKey, int], ...],
    channels: list[int],
    places: Mapping[int, list[tuple[AxisKey, list[int]]]],
    axes: Mapping[AxisKey, Axis],
    layers: Mapping[str, Layer],
    ranks: Mapping[str, int],
    taken: set[str],
) -> ChannelGroup:
    slots = tuple(
        Slot(tensor, axis, axes[tensor, axis].role, torch.tensor([places[c][i][1] for c in channels]))
        for i, ((tensor, axis), _) in enumerate(signature)
    )
    writers = [slot for slot in slots if slot.role == "write"] or list(slots)
    base = layer_name(writers[0].tensor, layers)
    name = next(n for n in (base, *(f"{base}#{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    taken.add(name)
    weight = layers.get(writers[0].tensor)
    one_writer = len(writers) == 1 and weight is not None
    kind = "channel" if not one_writer else "neuron" if ranks[writers[0].tensor] == 2 else "filter"
    return ChannelGroup(name, kind, len(channels), slots)


def layer_name(tensor: str, layers: Mapping[str, Layer]) -> str:
    """The layer that owns a parameter, as users call it."""
    return layers[tensor].name if tensor in layers else tensor.rpartition(".")[0] or tensor


def _pinned(
    axes: Mapping[AxisKey, Axis], reasons: Mapping[int, str], layers: Mapping[str, Layer], inputs: Mapping[str, int]
) -> list[Pinned]:
    found: dict[tuple[str, str], list[int]] = {(name, reasons[c]): [0] for name, c in inputs.items() if c in reasons}
    for (tensor, _), axis in axes.items():
        if axis.role == "write":
            for position, channel in enumerate(axis.names.tolist()):
                if channel in reasons:
                    found.setdefault((layer_name(tensor, layers), reasons[channel]), []).append(position)
    return [Pinned(where, tuple(channels), reason) for (where, reason), channels in found.items()]


def _classes(label: Tensor, names: Tensor) -> Tensor:
    return torch.where(names == NEUTRAL, NEUTRAL, label[names.clamp_min(0)])


def _single_axis(classes: Tensor) -> int | None:
    """The one axis along which `classes` varies; 0 if it varies along none, None if along several."""
    axes = [a for a in range(classes.dim()) if not (classes == classes.narrow(a, 0, 1)).all()]
    return None if len(axes) > 1 else axes[0] if axes else 0
