"""The channel graph: which channels live or die together, and where they lie in the parameters. Plain data."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from surgery.errors import BadKeep

Keep = Mapping[str, Tensor]
"""Per group name a boolean tensor of shape (units,); groups left out are kept whole."""


OVER = ":over"
"""Added to the name of a weight: the channels along whose axis it is applied, as a size."""
SOURCE = ":source"
"""Added to the name of a buffer of indices: the channels that these count, as a size."""


@dataclass(frozen=True, eq=False)
class Slot:
    """Where the units of a group lie along one axis of one tensor.

    `role` is "write" (the axis a layer produces), "read" (the axis whose weights consume the channel: here it is gated)
    or "carry" (per-channel vectors in between: bias, normalisation, scale). `positions` has shape (units, k): unit u
    occupies the k indices `positions[u]`.

    `tensor` may also be a size that a module remembers, such as `block.attention.num_heads`, seen as a vector of that
    length: role "size", or "norm" where statistics are taken over these channels (so closed ones must be left out).
    Role "order" is a buffer of indices, "source" the channels that these indices count, "over" those along whose axis
    a weight is applied.
    """

    tensor: str
    axis: int
    role: str
    positions: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units that are cut along one gate vector. `kind`: "filter", "neuron", "head", or "channel" of several writers.

    A `droppable` group may be closed altogether: its readers lie on a branch beside which the input reaches the output.
    """

    name: str
    kind: str
    units: int
    slots: tuple[Slot, ...]
    droppable: bool = False

    @property
    def readers(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.role == "read")

    @property
    def norms(self) -> tuple[Slot, ...]:
        """Where statistics are taken over the channels."""
        return tuple(slot for slot in self.slots if slot.role == "norm")


@dataclass(frozen=True)
class Pinned:
    """Channels of the layer or input `where` that may not be removed, and why."""

    where: str
    channels: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies: each element of `weight` is used in `repeats` multiply-adds per example.

    If the graph has a size named `weight` + OVER, as often for each of that many channels.
    """

    name: str
    weight: str
    repeats: float


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """What `surgery.trace` found. `shapes` holds every parameter, `buffers` and `sizes` those
    that have slots, `buffers` those that layers read as well. `fixed` holds the multiply-adds per example, by module,
    of layers that could not be followed, such as one whose weight the forward computes: a cut takes none of them.
    """

    groups: tuple[ChannelGroup, ...]
    pinned: tuple[Pinned, ...]
    layers: tuple[Layer, ...]
    shapes: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)

    @property
    def units(self) -> int:
        return sum(group.units for group in self.groups)

    @cached_property
    def by_name(self) -> Mapping[str, ChannelGroup]:
        return {group.name: group for group in self.groups}

    def units_along(self, role: str) -> dict[tuple[str, int], Tensor]:
        """Per axis with slots of `role` the unit at each index, in the flat order of all units; where none, past it."""
        found: dict[tuple[str, int], Tensor] = {}
        start = 0
        for group in self.groups:
            for slot in (slot for slot in group.slots if slot.role == role):
                key = slot.tensor, slot.axis
                units = found.setdefault(key, torch.full((self.length(*key),), self.units))
                units[slot.positions] = torch.arange(start, start + group.units)[:, None].expand_as(slot.positions)
            start += group.units
        return found

    def length(self, tensor: str, axis: int) -> int:
        """How many channels lie along an axis, or how large a remembered size is."""
        shape = self.shapes.get(tensor) or self.buffers.get(tensor) or (self.sizes[tensor],)
        return shape[axis]

    def complete(self, keep: Keep) -> dict[str, Tensor]:
        """`keep` checked against the graph, with an entry for every group. Raises BadKeep as `checked` does."""
        return self.checked(keep)[0]

    def checked(self, keep: Keep) -> tuple[dict[str, Tensor], dict[tuple[str, int], Tensor]]:
        """`keep` with an entry for every group; and per (tensor, axis) with slots which indices survive.

        Raises BadKeep for unknown groups, wrong shapes or types, and for a width that would be emptied.
        """
        unknown = sorted(set(keep) - set(self.by_name))
        if unknown:
            raise BadKeep(
                f"the keep names groups that the graph does not have: {', '.join(unknown[:3])}",
                at=f"keep with {len(keep)} entries; the graph has {len(self.groups)} groups",
                effect="nothing was changed",
                fix="take the names from graph.groups; the keep may come from another network's graph",
            )
        full: dict[str, Tensor] = {}
        for group in self.groups:
            given = keep.get(group.name)
            if given is None:
                full[group.name] = torch.ones(group.units, dtype=torch.bool)
                continue
            given = torch.as_tensor(given).cpu()
            if given.dtype != torch.bool or given.shape != (group.units,):
                raise BadKeep(
                    f"the keep of {group.name} is {given.dtype} of shape {tuple(given.shape)}; "
                    f"torch.bool of shape ({group.units},) is asked",
                    at=f"group {group.name}, {group.units} units",
                    effect="nothing was changed",
                    fix="give one boolean per unit",
                )
            full[group.name] = given
        alive = self.kept(full)
        if all(flags.any() for flags in alive.values()):
            return full, alive
        self._refuse_emptied(alive)
        return full, self.kept(self.physical(full))

    def physical(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a cut keeps for a complete `keep`: a width that would be empty has one unit left, which nobody reads."""
        empty = {key for key, flags in self.kept(keep).items() if not flags.any()}
        left = dict(keep)
        for group in self.groups:
            if empty and not keep[group.name].any() and any((s.tensor, s.axis) in empty for s in group.slots):
                left[group.name] = torch.arange(group.units) == 0
        return left

    def kept(self, keep: Keep) -> dict[tuple[str, int], Tensor]:
        """Per (tensor, axis) with slots, a boolean per index: does it survive? `keep` must be complete."""
        if not self.groups:
            return {}
        lengths, unit, place = self._places
        flat = torch.cat([keep[group.name] for group in self.groups])
        alive = torch.ones(sum(lengths.values()), dtype=torch.bool)
        alive[place[~flat[unit]]] = False
        return dict(zip(lengths, alive.split(list(lengths.values())), strict=True))

    @cached_property
    def _places(self) -> tuple[dict[tuple[str, int], int], Tensor, Tensor]:
        """All axes with slots laid end to end: their lengths; and per occupied index its unit, in the order of all
        units, and its place."""
        lengths: dict[tuple[str, int], int] = {}
        slots = [(group, slot) for group in self.groups for slot in group.slots]
        for _, slot in slots:
            lengths.setdefault((slot.tensor, slot.axis), self.length(slot.tensor, slot.axis))
        starts = dict(zip(lengths, itertools.accumulate(lengths.values(), initial=0), strict=False))
        ends = itertools.accumulate(group.units for group in self.groups)
        after = dict(zip((group.name for group in self.groups), ends, strict=True))
        unit = [
            torch.arange(after[group.name] - group.units, after[group.name]).repeat_interleave(slot.positions.shape[1])
            for group, slot in slots
        ]
        place = [slot.positions.reshape(-1) + starts[slot.tensor, slot.axis] for _, slot in slots]
        return lengths, torch.cat(unit), torch.cat(place)

    def _refuse_emptied(self, alive: Mapping[tuple[str, int], Tensor]) -> None:
        for (tensor, axis), mask in alive.items():
            if not mask.any():
                groups = [g for g in self.groups if any((s.tensor, s.axis) == (tensor, axis) for s in g.slots)]
                if all(group.droppable for group in groups):
                    continue
                culprits = [group.name for group in groups]
                raise BadKeep(
                    f"all {mask.numel()} channels on axis {axis} of {tensor} would be removed",
                    at=f"group {', '.join(culprits)}",
                    effect="nothing was changed: all that the network computes goes through this width",
                    fix="keep at least one unit of the group",
                )

    def summary(self) -> str:
        """A table of the groups and of what is pinned, as text."""
        rows: list[tuple[str, ...]] = [("group", "kind", "units", "writers", "readers")]
        for g in self.groups:
            writers = sum(slot.role == "write" for slot in g.slots)
            rows.append((g.name, g.kind, str(g.units), str(writers), str(len(g.readers))))
        lines = table(rows, right=(2, 3, 4))
        if self.pinned:
            rows = [("pinned", "channels", "reason")]
            rows += [(p.where, str(len(p.channels)), p.reason) for p in self.pinned]
            lines += ["", *table(rows, right=(1,))]
        return "\n".join(lines)


def table(rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> list[str]:
    """Lines of a plain table; the first row is its head, columns in `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]
