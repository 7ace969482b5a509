"""From tied names to groups of units."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.graph import ChannelGraph, ChannelGroup, Layer, Pinned, Slot
from surgery.names import NEUTRAL, Names, relabelled, relabelled_all, varying
from surgery.observed import Axis, Observed

AxisKey = tuple[str, int]

TIED = "all channels of a width are tied together"
UNSEEN = "not run in the traced forward: stays whole, and does not fit if another path feeds it channels that were cut"


def resolve(seen: Observed, names: Names, label: Tensor) -> tuple[dict[AxisKey, Axis], dict[int, str]]:
    """Every axis with the class of each index instead of its name, and the reason of each pinned class.

    `names` are those of `seen`, perhaps with more ties and pins; what is pinned here is added to them.
    """
    axes = dict(seen.axes)
    layered = {tensor for tensor, _ in seen.axes}
    for tensor, elements in seen.elements.items():
        axis = single_axis(relabelled(label, elements))
        if tensor in layered:
            for used in (elements, *(a.names for (name, _), a in seen.axes.items() if name == tensor)):
                names.pin(used, f"{tensor} is used by a layer and also element by element")
        elif axis is None:
            names.pin(elements, f"{tensor} holds channels along several axes")
        else:
            axes[tensor, axis] = Axis("carry", elements.movedim(axis, 0).flatten(1)[:, 0])
    for (tensor, _), axis_seen in axes.items():
        if tensor in seen.opaque:
            names.pin(axis_seen.names, seen.opaque[tensor])
    found = relabelled_all(label, [axis.names for axis in axes.values()])
    resolved = {key: Axis(axis.role, part) for (key, axis), part in zip(axes.items(), found, strict=True)}
    return resolved, names.reasons(label)


def build(
    axes: Mapping[AxisKey, Axis],
    reasons: Mapping[int, str],
    layers: Mapping[str, Layer],
    model: nn.Module,
    inputs: Mapping[str, int] | None = None,
    unseen: Sequence[str] = (),
    tied_by: Callable[[int], list[str]] = lambda _: [],
) -> ChannelGraph:
    """Units with the same slots form a group, named after its first writer; what is pinned or unread stays out."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    places = _places(axes)
    reasons = dict(reasons)
    groups: list[ChannelGroup] = []
    taken: set[str] = set()
    for units in places.alike(set(reasons)):
        slots = places.slots(units, axes)
        why = _not_free(slots, len(units), axes, parameters)
        if why == TIED:
            operators = tied_by(int(places.channel[units[0]])) or ["each other"]
            more = f" and {len(operators) - 2} more" if len(operators) > 2 else ""
            why = f"{TIED} by {', '.join(operators[:2])}{more}"
        if why:
            reasons |= dict.fromkeys(places.channel[units].tolist(), why)
        else:
            groups.append(_group(slots, len(units), layers, parameters, taken))
    return ChannelGraph(
        groups=tuple(groups),
        pinned=(*_pinned(axes, reasons, layers, inputs or {}), *(Pinned(name, (), UNSEEN) for name in unseen)),
        layers=tuple(layers.values()),
        shapes={name: tuple(p.shape) for name, p in parameters.items()},
        buffers={name: tuple(buffers[name].shape) for name in (*(n for n, _ in axes), *layers) if name in buffers},
        sizes={name: len(axis.names) for (name, _), axis in axes.items() if name not in parameters | buffers},
    )


@dataclass(frozen=True)
class _Places:
    """Where every channel lies: entries sorted by channel, then axis, then position. `start` has one more element."""

    keys: list[AxisKey]
    channel: Tensor
    start: Tensor
    axis: Tensor
    position: Tensor
    first: Tensor

    def alike(self, without: set[int]) -> list[Tensor]:
        """Channels by what they have along each axis, as indices into `channel`; in the order of the network."""
        if not len(self.channel):
            return []
        marks = torch.randint(2**62, (len(self.keys),), generator=torch.Generator().manual_seed(0))
        owner = torch.repeat_interleave(torch.arange(len(self.channel)), self.start.diff())
        signature = torch.zeros(len(self.channel), dtype=torch.long).index_add_(0, owner, marks[self.axis])
        free = ~torch.isin(self.channel, torch.tensor(sorted(without), dtype=torch.long))
        order = torch.argsort(self.first[free])
        found: dict[int, list[int]] = {}
        for unit, mark in zip(free.nonzero()[order, 0].tolist(), signature[free][order].tolist(), strict=True):
            found.setdefault(mark, []).append(unit)
        return [torch.tensor(units) for units in found.values()]

    def slots(self, units: Tensor, axes: Mapping[AxisKey, Axis]) -> tuple[Slot, ...]:
        start, stop = self.start[units], self.start[units + 1]
        entries = start[:, None] + torch.arange(int((stop - start)[0]))
        keys, counts = self.axis[entries[0]].unique_consecutive(return_counts=True)
        parts = self.position[entries].split(counts.tolist(), dim=1)
        places = (self.keys[key] for key in keys.tolist())
        return tuple(Slot(key[0], key[1], axes[key].role, part) for key, part in zip(places, parts, strict=True))


def _places(axes: Mapping[AxisKey, Axis]) -> _Places:
    keys = list(axes)
    names = [axes[key].names for key in keys]
    lengths = torch.tensor([len(n) for n in names], dtype=torch.long)
    channel = torch.cat(names) if names else torch.empty(0, dtype=torch.long)
    axis = torch.repeat_interleave(torch.arange(len(keys)), lengths)
    position = torch.cat([torch.arange(len(n)) for n in names]) if names else channel
    order = torch.argsort(channel, stable=True)
    order = order[channel[order] != NEUTRAL]
    found, counts = torch.unique_consecutive(channel[order], return_counts=True)
    start = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0)))
    return _Places(keys, found, start, axis[order], position[order], order[start[:-1]])


def _not_free(
    slots: tuple[Slot, ...], units: int, axes: Mapping[AxisKey, Axis], parameters: Mapping[str, Tensor]
) -> str | None:
    """Why channels with these slots may not be removed, if so."""
    if not any(slot.role == "read" for slot in slots):
        return "no layer with weights reads it"
    if not any(slot.tensor in parameters and slot.role != "read" for slot in slots):
        return "a constant of the network"
    for slot in slots:
        if units == 1 and slot.positions.shape[1] == len(axes[slot.tensor, slot.axis].names):
            return TIED
    return None


def _group(
    slots: tuple[Slot, ...],
    units: int,
    layers: Mapping[str, Layer],
    parameters: Mapping[str, Tensor],
    taken: set[str],
) -> ChannelGroup:
    writers = [slot for slot in slots if slot.role == "write"] or list(slots)
    base = layer_name(writers[0].tensor, layers)
    name = next(n for n in (base, *(f"{base}#{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    taken.add(name)
    return ChannelGroup(name, _kind(slots, writers, layers, parameters), units, slots)


def _kind(
    slots: tuple[Slot, ...], writers: list[Slot], layers: Mapping[str, Layer], parameters: Mapping[str, Tensor]
) -> str:
    if any(slot.role == "size" and "head" in slot.tensor.rpartition(".")[2] for slot in slots):
        return "head"
    if len(writers) > 1 or writers[0].tensor not in layers:
        return "channel"
    return "neuron" if parameters[writers[0].tensor].dim() == 2 else "filter"


def layer_name(tensor: str, layers: Mapping[str, Layer]) -> str:
    """The layer that owns a parameter, as users call it."""
    return layers[tensor].name if tensor in layers else tensor.rpartition(".")[0] or tensor


def _pinned(
    axes: Mapping[AxisKey, Axis], reasons: Mapping[int, str], layers: Mapping[str, Layer], inputs: Mapping[str, int]
) -> list[Pinned]:
    found: dict[tuple[str, str], list[int]] = {(name, reasons[c]): [0] for name, c in inputs.items() if c in reasons}
    pinned = torch.tensor(sorted(reasons), dtype=torch.long)
    for (tensor, _), axis in axes.items():
        if axis.role == "write":
            for position in torch.isin(axis.names, pinned).nonzero().squeeze(1).tolist():
                reason = reasons[int(axis.names[position])]
                found.setdefault((layer_name(tensor, layers), reason), []).append(position)
    return [Pinned(where, tuple(channels), reason) for (where, reason), channels in found.items()]


def single_axis(classes: Tensor) -> int | None:
    """The one axis along which `classes` varies; 0 if it varies along none, None if along several."""
    axes = varying(classes)
    return None if len(axes) > 1 else axes[0] if axes else 0
