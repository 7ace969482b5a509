"""Which units to cut out of a network to find out whether its graph is right."""

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def random(units: Mapping[str, int]) -> dict[str, Tensor]:
    """A keep without a random fifth to half of each group, at least one unit; of one unit nothing is left."""
    keep = {}
    for index, (name, count) in enumerate(units.items()):
        generator = torch.Generator().manual_seed(index)
        share = 0.2 + 0.3 * torch.rand((), generator=generator).item()
        closed = torch.randperm(count, generator=generator)[: max(1, int(share * count))]
        keep[name] = torch.ones(count, dtype=torch.bool).index_fill_(0, closed, False)
    return keep


def lopsided(units: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """Keeps that show what an even cut hides.

    The first closes the first units of every group, an odd number above one where it can: halves and even places are
    then other ones. In the two after it no two widths in a row lose equally many, whatever their size: the numbers
    are digits of a counter, which runs for each size by itself.
    """
    yield {name: _without_first(count, max(1, min(3, count - 2))) for name, count in units.items()}
    seen: Counter[int] = Counter()
    digits: dict[str, tuple[int, int, int]] = {}
    for name, count in units.items():
        base = min(max(count, 2), 6)
        code = 1 + seen[count] % (base**2 - 1)
        seen[count] += 1
        digits[name] = code // base, code % base, base
    for place in (0, 1):
        yield {
            name: _without_first(count, round(digits[name][place] * (count - 1) / (digits[name][2] - 1)))
            for name, count in units.items()
        }


def _without_first(units: int, closed: int) -> Tensor:
    return torch.arange(units) >= closed
