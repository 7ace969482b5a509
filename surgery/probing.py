"""Which units to cut out of a network to find out whether its graph is right."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor


def random(units: Mapping[str, int]) -> dict[str, Tensor]:
    """A keep without a random fifth to half of each group, at least one unit; of one unit nothing is left.

    The middle unit always goes, of six or more the first one too: halves, even places, and constants that count from
    the first or from the last channel are then other ones. Of four or more one more goes in every other group, so that
    two that should be one do not lose equally many. Two units stay where they can: a width of one hides places.
    """
    keep = {}
    for index, (name, count) in enumerate(units.items()):
        generator = torch.Generator().manual_seed(index)
        share = 0.2 + 0.3 * torch.rand((), generator=generator).item()
        surely = {count // 2} | ({0} if count > 5 else set())
        if count > 3 and index % 2 == 0:
            surely.add(0 if 0 not in surely else count - 1)
        others = [i for i in torch.randperm(count, generator=generator).tolist() if i not in surely]
        closed = [*surely, *others[: max(0, min(int(share * count) - 1, count - 2 - len(surely)))]]
        keep[name] = torch.ones(count, dtype=torch.bool)
        keep[name][closed] = False
    return keep


def without_first(units: Mapping[str, int], sharing: Collection[str]) -> dict[str, Tensor]:
    """A keep without the first units of every group, an odd number above one where it can.

    Groups that are alone in a width keep two where they can, as in `random`; those that are `sharing` all of theirs
    keep one: half of six channels, rounded up, are as many as half of five, but not of four.
    """
    left = {name: 1 if name in sharing else 2 for name in units}
    return {name: torch.arange(count) >= max(1, min(3, count - left[name])) for name, count in units.items()}


def equal(units: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """A keep that leaves all groups equally wide, where that can be: `units` are (units, channels of each)."""
    width = max(2, min(count * channels for count, channels in units.values()))
    kept = {name: max(min(2, count), min(count, width // channels)) for name, (count, channels) in units.items()}
    return {name: torch.arange(units[name][0]) < n for name, n in kept.items()}


def lopsided(units: Mapping[str, int], meetings: Iterable[Iterable[str]]) -> Iterator[dict[str, Tensor]]:
    """Keeps that show what an even cut hides: of two groups one loses its first unit while the other does not.

    There are as many as tell groups apart, above all those that meet somewhere (`meetings`).
    """
    number = numbered(units, meetings)
    for bit in range(max(number.values(), default=0).bit_length()):
        yield {name: torch.arange(units[name]) >= 1 for name, n in number.items() if n >> bit & 1}


def numbered(units: Mapping[str, int], meetings: Iterable[Iterable[str]]) -> dict[str, int]:
    """A number from 1 for every group in a meeting: all different where groups meet, and three in a row always."""
    others: dict[str, set[str]] = {}
    for meeting in meetings:
        present = [name for name in meeting if name in units]
        for name in present:
            others.setdefault(name, set()).update(present)
    number: dict[str, int] = {}
    for i, name in enumerate(name for name in units if name in others):
        taken = {number.get(other) for other in others[name]}
        candidates = itertools.chain(((i + k) % 3 + 1 for k in range(3)), itertools.count(4))
        number[name] = next(n for n in candidates if n not in taken)
    return number
