"""Names of channels: integers that are moved, tied and pinned in place of the numbers a network computes with.

A *names tensor* has the shape of an activation; each element holds the name of the channel it belongs to, or NEUTRAL
where it belongs to none (a constant). Most are expanded views of one vector, so they cost next to no memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NEUTRAL = -1


@dataclass
class Names:
    """A union-find over names: `fresh` makes them, `tie` joins them, `pin` forbids their removal and says why.

    `origins` tells for each batch of `edges` what was going on: the value of `at` then.
    """

    count: int = 0
    edges: list[Tensor] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    at: str = ""
    pins: list[tuple[Tensor, str]] = field(default_factory=list)

    def copy(self) -> "Names":
        return Names(self.count, list(self.edges), list(self.origins), self.at, list(self.pins))

    def fresh(self, n: int) -> Tensor:
        """`n` new names, shape (n,)."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Join `a` and `b` element by element (shapes that broadcast); NEUTRAL ties nothing."""
        pairs = torch.stack(torch.broadcast_tensors(dense(a), dense(b))).flatten(1)
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs != NEUTRAL).all(0)]
        if pairs.numel():
            self.edges.append(distinct(pairs))
            self.origins.append(self.at)

    def pin(self, names: Tensor, reason: str) -> None:
        """Forbid the removal of every channel in `names` (any shape)."""
        found = dense(names).unique()
        self.pins.append((found[found != NEUTRAL], reason))

    def classes(self) -> Tensor:
        """The smallest name tied to each name, shape (count,): connected components by label propagation."""
        label = torch.arange(self.count)
        if not self.edges:
            return label
        a, b = torch.cat(self.edges, dim=1)
        while not torch.equal(label[a], label[b]):
            low = torch.minimum(label[a], label[b])
            for side in (a, b):
                label.scatter_reduce_(0, label[side], low, "amin")
            while not torch.equal(label, label[label]):
                label = label[label]
        return label

    def tied_by(self, label: Tensor, channel: int) -> list[str]:
        """What tied the names of one class, each once."""
        found = (at for pairs, at in zip(self.edges, self.origins, strict=True) if (label[pairs[0]] == channel).any())
        return list(dict.fromkeys(found))

    def reasons(self, label: Tensor) -> dict[int, str]:
        """Pinned classes and the reason given first for each."""
        found: dict[int, str] = {}
        for names, reason in self.pins:
            for name in label[names].unique().tolist():
                found.setdefault(name, reason)
        return found


def everywhere(name: int | Tensor, shape: Sequence[int]) -> Tensor:
    """A names tensor of `shape` with one name in every place."""
    return torch.as_tensor(name).view([1] * len(shape)).expand(tuple(shape))


def dense(names: Tensor) -> Tensor:
    """`names` without its expanded axes: each becomes size 1, no element is lost."""
    return shortened(names, [axis for axis, stride in enumerate(names.stride()) if stride == 0])


def shortened(names: Tensor, axes: Sequence[int]) -> Tensor:
    """`names` cut down to the first index of `axes`."""
    if not axes or not names.numel():
        return names
    sizes = [1 if axis in axes else n for axis, n in enumerate(names.shape)]
    return torch.as_strided(names, sizes, names.stride())


def together(compute: Callable[..., Tensor], tensors: Sequence[Tensor], fixed: int | None = None) -> Tensor:
    """`compute(*tensors)` on tensors of one rank, sparing the axes along which all are expanded (except axis `fixed`).

    `compute` must treat those axes element by element and keep their size.
    """
    rank = tensors[0].dim()
    spared = [
        a for a in range(rank) if a != fixed and all(t.stride(a) == 0 or t.shape[a] == 1 for t in tensors)
        and len({t.shape[a] for t in tensors}) == 1
    ]
    result = compute(*(shortened(t, spared) for t in tensors))
    return torch.broadcast_to(result, [tensors[0].shape[a] if a in spared else result.shape[a] for a in range(rank)])


def distinct(pairs: Tensor) -> Tensor:
    """The different columns of `pairs`, shape (2, n), values from NEUTRAL up."""
    if pairs.shape[1] < 256:
        columns: Tensor = torch.unique(pairs, dim=1)
        return columns
    base = int(pairs.max()) + 2
    codes = torch.unique((pairs[0] + 1) * base + pairs[1] + 1)
    return torch.stack((codes // base - 1, codes % base - 1))


def relabelled(label: Tensor, names: Tensor) -> Tensor:
    """The class of each name; NEUTRAL stays."""
    small = dense(names)
    return torch.where(small == NEUTRAL, NEUTRAL, label[small.clamp_min(0)]).expand(names.shape)


def relabelled_all(label: Tensor, vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`relabelled` of many vectors at once."""
    if not vectors:
        return ()
    return torch.split(relabelled(label, torch.cat(tuple(vectors))), [len(vector) for vector in vectors])


def along(names: Tensor, axis: int) -> Tensor:
    """The names along `axis`, shape (channels,), where they vary along no other."""
    for other in range(names.dim()):
        if other != axis:
            names = names.narrow(other, 0, 1)
    return names.reshape(-1)


def width(names: Tensor) -> Tensor | None:
    """The names along the only axis on which they vary, shape (channels,); None if there is no such axis."""
    axes = varying(names)
    return along(names, axes[0]) if len(axes) == 1 else None


def varying(names: Tensor) -> list[int]:
    """The axes along which `names` is not constant."""
    small, axes = dense(names), []
    for axis, n in enumerate(small.shape):
        first = shortened(small, [axis])
        if n > 1 and (small == first).all():
            small = first
        elif n > 1:
            axes.append(axis)
    return axes


def compact(names: Tensor) -> Tensor:
    """The same names, expanded along every axis on which they are constant, so that what follows is quick."""
    if dense(names).numel() < 1 << 12:
        return names
    varied = varying(names)
    return shortened(names, [axis for axis in range(names.dim()) if axis not in varied]).expand(names.shape)
