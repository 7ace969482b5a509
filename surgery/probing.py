"""Which units to cut out of a network to find out whether its graph is right."""

import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor


def random(units: Mapping[str, int]) -> dict[str, Tensor]:
    """A keep without a random fifth to half of each group, at least one unit; of one unit nothing is left.

    The first unit (of three or more) and the middle one always go: halves, even places, and constants that count from
    the first or from the last channel are then other ones. Of four or more one more goes in every other group, so that
    two that should be one do not lose equally many.
    """
    keep = {}
    for index, (name, count) in enumerate(units.items()):
        generator = torch.Generator().manual_seed(index)
        share = 0.2 + 0.3 * torch.rand((), generator=generator).item()
        order = torch.randperm(count, generator=generator)
        keep[name] = torch.ones(count, dtype=torch.bool)
        keep[name][order[: max(0, int(share * count) - 1)]] = False
        keep[name][count // 2] = False
        keep[name][0] &= count < 3
        keep[name][-1] &= count < 4 or index % 2 == 1
    return keep


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
