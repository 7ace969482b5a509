"""Which units to cut out of a network to find out whether its graph is right."""

import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor


def random(units: Mapping[str, int]) -> dict[str, Tensor]:
    """A keep without a random fifth to half of each group, at least one unit; of one unit nothing is left.

    The unit in the middle always goes: constants that count places from the first or from the last channel then move.
    """
    keep = {}
    for index, (name, count) in enumerate(units.items()):
        generator = torch.Generator().manual_seed(index)
        share = 0.2 + 0.3 * torch.rand((), generator=generator).item()
        order = torch.randperm(count, generator=generator)
        keep[name] = torch.ones(count, dtype=torch.bool)
        keep[name][order[: max(1, int(share * count)) - 1]] = False
        keep[name][count // 2] = False
    return keep


def lopsided(units: Mapping[str, int], meetings: Iterable[Iterable[str]]) -> Iterator[dict[str, Tensor]]:
    """Keeps that show what an even cut hides.

    The first closes the first units of every group, an odd number above one where it can: halves and even places are
    then other ones. After it come as many as tell groups apart, above all those that meet somewhere (`meetings`): each
    closes one unit of some groups, and of two groups one loses while the other does not.
    """
    yield {name: _without_first(count, max(1, min(3, count - 2))) for name, count in units.items()}
    number = numbered(units, meetings)
    for bit in range(max(number.values(), default=0).bit_length()):
        yield {name: _without_first(units[name], 1) for name, n in number.items() if n >> bit & 1}


def numbered(units: Mapping[str, int], meetings: Iterable[Iterable[str]]) -> dict[str, int]:
    """A number from 1 for every group in a meeting: all different where groups meet, and seven in a row always."""
    others: dict[str, set[str]] = {}
    for meeting in meetings:
        present = [name for name in meeting if name in units]
        for name in present:
            others.setdefault(name, set()).update(present)
    number: dict[str, int] = {}
    for i, name in enumerate(name for name in units if name in others):
        taken = {number.get(other) for other in others[name]}
        candidates = itertools.chain(((i + k) % 7 + 1 for k in range(7)), itertools.count(8))
        number[name] = next(n for n in candidates if n not in taken)
    return number


def _without_first(units: int, closed: int) -> Tensor:
    return torch.arange(units) >= closed
