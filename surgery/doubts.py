"""Numbers of a forward that may not follow a cut: what to suppose of them until a cut network tells."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.names import NEUTRAL, Names, along, relabelled, varying, width
from surgery.observed import Axis, Doubt, Observed
from surgery.units import AxisKey


@dataclass(frozen=True)
class Supposition:
    """What is supposed of the doubts at one line of code.

    Where a view splits the channels over several axes, a cut network can only be shorter along one of them: the
    `rank`-th, largest first, unless ties from elsewhere leave a single one. Attributes of the module of the same value
    as a size that the line spells out are taken for that size, and follow the cut: one "integer", the first, second
    and so on (`index`), or all "integers", or also "lists" of some, or the first beside the width of an "input" of the
    module, which then has to lose the same positions, or "nothing". By coincidence a head is as wide as there are
    heads, or a kernel: so one after the other, the fewest first.
    """

    rank: int = 0
    remembered: str = "integer"
    index: int = 0

    def next(self, alike: int = 1) -> "Supposition":
        """What to suppose after this one has failed, where `alike` integers have the same value."""
        if self.remembered == "integer" and self.index + 1 < alike:
            return Supposition(self.rank, "integer", self.index + 1)
        after = {"integer": "integers", "integers": "lists", "lists": "input", "input": "nothing"}.get(self.remembered)
        return Supposition(self.rank, after) if after else Supposition(self.rank + 1)


@dataclass(frozen=True)
class Settled:
    """`Observed` under suppositions: its names with all ties and pins, their classes, and sizes as axes."""

    names: Names
    label: Tensor
    sizes: Mapping[AxisKey, Axis]


def settle(
    seen: Observed,
    model: nn.Module,
    suppositions: Mapping[str, Supposition],
    pins: Mapping[str, str],
    pinned: Sequence[tuple[Tensor, str]] = (),
) -> Settled:
    """Apply what is supposed of each doubt (by key; Supposition() if missing) and pin the keys of `pins`.

    `pinned` holds further names (any shape), each with a reason.
    """
    names = seen.names.copy()
    for channels, reason in pinned:
        names.pin(channels, reason)
    for doubt in seen.doubts:
        if doubt.key in pins:
            names.pin(doubt.names, f"{doubt.text}: {pins[doubt.key]}")
    label = names.classes()
    while True:
        for doubt in seen.doubts:
            classes = relabelled(label, doubt.names)
            axes, supposition = varying(classes), suppositions.get(doubt.key, Supposition())
            names.at = doubt.text
            if supposition.remembered == "input":
                _tie_to_input(names, label, doubt)
            if len(axes) > 1:
                rank = supposition.rank
                order = sorted(axes, key=lambda axis: (-doubt.names.shape[axis], -axis))
                for axis in order:
                    if axis != order[min(rank, len(order) - 1)]:
                        names.tie(doubt.names, doubt.names.narrow(axis, 0, 1))
        before, label = label, names.classes()
        if torch.equal(before, label):
            return Settled(names, label, _sizes(seen, model, label, suppositions))


def _tie_to_input(names: Names, label: Tensor, doubt: Doubt) -> None:
    """The width that came in and the one of equal length that the line spells out lose the same positions."""
    result = width(doubt.names)
    if result is None or len(result) not in doubt.sizes:
        return
    for given in doubt.given:
        if len(given) == len(result) and not torch.equal(relabelled(label, given), relabelled(label, result)):
            names.tie(given, result)


def lookalikes(model: nn.Module, doubt: Doubt) -> int:
    """How many integers of the module have the same value as a size that the line spells out."""
    module = model.get_submodule(doubt.owner)
    return max((len(list(_attributes(module, number, lists=False))) for number in doubt.sizes), default=0)


def ranks(doubt: Doubt) -> int:
    """How many axes a line could be cut along."""
    return max(1, len(varying(doubt.names)))


def _sizes(
    seen: Observed, model: nn.Module, label: Tensor, suppositions: Mapping[str, Supposition]
) -> dict[AxisKey, Axis]:
    """Attributes that remember what a line spells out. One that would have to remember two widths remembers none."""
    found: dict[AxisKey, Axis] = {}
    clashing: set[AxisKey] = set()
    for doubt in seen.doubts:
        supposed = suppositions.get(doubt.key, Supposition())
        remembered = supposed.remembered
        if remembered == "nothing":
            continue
        classes = relabelled(label, doubt.names)
        for axis in varying(classes):
            owner, lists, vector = model.get_submodule(doubt.owner), remembered == "lists", along(classes, axis)
            number = doubt.sizes[axis]
            if axis == 0 and number == len(vector):  # the batch lies on the same axis, before the channels
                vector = _period(vector)
                number = len(vector)
            known_as = _attributes(owner, number, lists=lists)
            one = (supposed.index, supposed.index + 1) if remembered in ("integer", "input") else (0, None)
            for attribute in itertools.islice(known_as, *one):
                key = (f"{doubt.owner}.{attribute}", 0)
                known = found.setdefault(key, Axis("size", vector))
                if key in seen.axes or not torch.equal(known.names, vector):
                    clashing.add(key)
    return {key: axis for key, axis in found.items() if key not in clashing and (axis.names != NEUTRAL).all()}


def _period(vector: Tensor) -> Tensor:
    """The shortest start of `vector` that it repeats."""
    for n in range(1, len(vector) // 2 + 1):
        if len(vector) % n == 0 and torch.equal(vector[:n].repeat(len(vector) // n), vector):
            return vector[:n]
    return vector


def _attributes(module: nn.Module, number: int, *, lists: bool) -> Iterator[str]:
    """Names of integers that the module has, such as `num_heads`, or in a list: `shape[0]`."""
    if number > 1:
        for name, value in vars(module).items():
            if type(value) is int and value == number:
                yield name
            elif lists and isinstance(value, tuple | list) and len(value) < 9:
                yield from (f"{name}[{i}]" for i, entry in enumerate(value) if type(entry) is int and entry == number)
