"""Parameters and multiply-adds as a function of which units are open. Exact for a keep, differentiable for chances."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from surgery.graph import OVER, ChannelGraph, ChannelGroup, Keep


@dataclass(frozen=True)
class Size:
    """Elements of all parameters, and multiply-adds per example of convolutional and linear layers."""

    params: int
    macs: int


class SizeModel:
    """The cost of a coupled network: sum over tensors of coefficient * product over axes of the kept length.

    `units` orders the units of all groups as one flat vector, as `flat` does. For chances p of independent units,
    `params(p)` and `macs(p)` are the expected cost, exact as long as no group lies on both axes of one weight (there
    the variance of its width is missing); for zeros and ones they are the true cost always. `axes` maps every (tensor,
    axis) that has a width of its own to its place in `lengths`.
    """

    drops: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Groups that cost nothing when they are closed altogether, each with those that nobody reads any more then.

    Here none: in torch one unit of a branch stays.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph, self.units = graph, graph.units
        weights = {layer.weight: graph.buffers[layer.weight] for layer in graph.layers if layer.weight in graph.buffers}
        tensors = {**graph.shapes, **weights}  # a buffer that a layer reads is no parameter, but it has multiply-adds
        keys: dict[tuple[str, int], int] = {}
        unit_of, axis_of, counts, offset = [], [], [], 0
        for group in graph.groups:
            for slot in (s for s in group.slots if s.tensor in tensors or s.role == "over"):
                axis = keys.setdefault((slot.tensor, slot.axis), len(keys))
                unit_of.append(torch.arange(offset, offset + group.units))
                axis_of.append(torch.full((group.units,), axis))
                counts.append(torch.full((group.units,), float(slot.positions.shape[1])))
            offset += group.units
        self.axes = keys
        self._unit = torch.cat(unit_of) if unit_of else torch.empty(0, dtype=torch.long)
        self._axis = torch.cat(axis_of) if axis_of else torch.empty(0, dtype=torch.long)
        self._count = torch.cat(counts).double() if counts else torch.empty(0).double()
        full = torch.tensor([float(graph.length(tensor, axis)) for tensor, axis in keys] + [1.0]).double()
        self._fixed = full.index_add(0, self._axis, -self._count)
        repeats = {layer.weight: layer.repeats for layer in graph.layers}
        self._unfollowed = sum(graph.fixed.values())
        rank = max(Counter(tensor for tensor, _ in keys).values(), default=1)
        axes, elements, macs, over = [], [], [], []
        for tensor, shape in tensors.items():
            mine = [(axis, keys[tensor, axis]) for axis in range(len(shape)) if (tensor, axis) in keys]
            rest = torch.Size(n for axis, n in enumerate(shape) if (tensor, axis) not in keys).numel()
            axes.append([i for _, i in mine] + [len(keys)] * (rank - len(mine)))
            elements.append(float(rest) if tensor in graph.shapes else 0.0)
            along = (f"{tensor}{OVER}", 0)
            fixed = graph.sizes.get(along[0], 1) if along not in keys else 1
            macs.append(rest * fixed * repeats.get(tensor, 0.0))
            over.append(keys.get(along, len(keys)))
        self._axes = torch.tensor(axes, dtype=torch.long)
        self._over = torch.tensor(over, dtype=torch.long)
        self._elements, self._macs = torch.tensor(elements).double(), torch.tensor(macs).double()

    def params(self, open_: Tensor) -> Tensor:
        """Parameters for `open_`, shape (units,), values in [0, 1]. float64 scalar."""
        products, _ = self._products(open_)
        return (self._elements * products).sum()

    def macs(self, open_: Tensor) -> Tensor:
        """Multiply-adds per example for `open_`, shape (units,), values in [0, 1]. float64 scalar."""
        products, lengths = self._products(open_)
        return (self._macs * products * lengths[self._over]).sum() + self._unfollowed

    def lengths(self, open_: Tensor) -> Tensor:
        """The expected width of every axis in `axes`, float64, for `open_`, shape (units,); a 1 comes last."""
        return self._products(open_)[1]

    def of(self, keep: Keep) -> Size:
        """The true size for a keep. Raises BadKeep."""
        left = self.graph.physical(self.graph.complete(keep))
        flat = self.flat(left).double()
        return Size(round(self.params(flat).item()), round(self.macs(flat).item()))

    @property
    def dense(self) -> Size:
        return self.of({})

    def flat(self, keep: Keep) -> Tensor:
        """A keep as one boolean vector, shape (units,)."""
        full = self.graph.complete(keep)
        return torch.cat([full[g.name] for g in self.graph.groups]) if full else torch.empty(0, dtype=torch.bool)

    def without(self, group: ChannelGroup) -> Tensor:
        """Everything open but `group`, shape (units,): what its removal alone would leave."""
        return torch.cat([torch.full((g.units,), float(g is not group)) for g in self.graph.groups])

    def keep(self, flat: Tensor) -> dict[str, Tensor]:
        """A boolean vector of shape (units,) as a keep."""
        parts = torch.split(flat.cpu(), [g.units for g in self.graph.groups])
        return {group.name: part.clone() for group, part in zip(self.graph.groups, parts, strict=True)}

    def _products(self, open_: Tensor) -> tuple[Tensor, Tensor]:
        """Per tensor the product of the kept lengths of its axes with slots; and these lengths, with a last 1."""
        device = open_.device
        if self._fixed.device != device:
            for name in ("_unit", "_axis", "_count", "_fixed", "_axes", "_over", "_elements", "_macs"):
                setattr(self, name, getattr(self, name).to(device))
        weights = open_.double()[self._unit] * self._count
        lengths = self._fixed.index_add(0, self._axis, weights)
        return lengths[self._axes].prod(1), lengths
