"""Gates on a network: they multiply the weights of the layers that read a channel."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffprune.bundles import Bundle, Bundles, gate_of
from diffprune.errors import BadModel, NothingToCut
from diffprune.gates import Gate, GatedModule, family
from diffprune.products import places_of, products
from diffprune.score import as_logits
from surgery import ChannelGraph, SizeModel, gate_norm_, norm_units, ungate_
from surgery.rebuilding import copied


class GatedModel(GatedModule):
    """`model` whose readers see W[:, c] * gate[unit of c]. One sample per forward in training, hard gates in eval.

    Per reader weight and axis `_units` tells the unit at each index, past the end where it is pinned; all one tensor.
    `logits` is one flat parameter, shape (gates,), float32, one for every unit unless bundles share one: `gate_of`,
    shape (units,), tells which. `shift` is added to all of them (the budget's scalar).
    """

    shift: Tensor
    group: Tensor
    gate_of: Tensor
    _units: Tensor

    def __init__(self, model: nn.Module, graph: ChannelGraph, gate: Gate, bundles: Iterable[Bundle] = ()) -> None:
        super().__init__()
        require_groups(graph)
        self.model, self.graph, self.gate = copied(model), graph, gate
        self.size = SizeModel(graph)
        device = next(model.parameters()).device
        of = gate_of(graph, bundles)
        self.logits = nn.Parameter(torch.full((int(of.max()) + 1,), gate.start, device=device))
        self.register_buffer("shift", torch.zeros((), device=device))
        self.register_buffer("gate_of", of.to(device))
        self.register_buffer("group", _group_of_gates(graph, of).to(device))
        read = graph.units_along("read")
        self.register_buffer("_units", torch.cat(list(read.values())).to(device), persistent=False)
        self._lengths = {slot: len(units) for slot, units in read.items()}
        self._axes: dict[str, list[int]] = {}
        for tensor, axis in read:
            self._axes.setdefault(tensor, []).append(axis)
        self._places = places_of(self.model, self._axes)
        self._norms = norm_units(graph)
        for i, (name, index) in enumerate(self._norms.items()):
            self.register_buffer(f"norm_{i}", index.to(device), persistent=False)
            gate_norm_(self.model.get_submodule(name), torch.ones(len(index), device=device))
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        gates = self.sample() if self.training else self.hard()
        weights = {name: self.model.get_parameter(name) for name in self._axes}
        factors = self._factors(gates)
        with products(weights, self._places, lambda name: self._gated_weight(name, weights[name], factors)) as gated:
            return functional_call(self.model, {**gated, **self.norm_counts(gates)}, args, kwargs, tie_weights=False)

    def sample(self) -> Tensor:
        """Gates of one step, shape (units,), differentiable in the logits."""
        return self.gate.sample(self.logits + self.shift, self.group)[self.gate_of]

    def hard(self) -> Tensor:
        """Gates without noise, shape (units,)."""
        return self.gate.hard(self.logits + self.shift)[self.gate_of]

    def chance(self) -> Tensor:
        """Probability that each unit is open, shape (units,), differentiable in the logits."""
        return self.gate.chance(self.logits + self.shift)[self.gate_of]

    def scores(self) -> Tensor:
        """The logit of each unit, shape (units,): what `land` ranks by."""
        return self.logits.detach()[self.gate_of]

    def start_from_(self, scores: Tensor) -> None:
        """Set the logits by `scores` of units, shape (units,); what shares a gate starts from its mean."""
        of = self.gate_of.cpu()
        count = of.bincount()
        self.logits.data.copy_(as_logits(torch.zeros(len(count)).double().index_add(0, of, scores) / count))

    def keep(self) -> dict[str, Tensor]:
        """Which units are open without noise: per group a boolean of shape (units,)."""
        return self.size.keep(self.hard().detach() > 0)

    def closed(self) -> dict[str, Tensor]:
        """The opposite of `keep`."""
        return {name: ~flags for name, flags in self.keep().items()}

    def parameters_of_gates(self) -> list[nn.Parameter]:
        """For an optimizer group of their own: a large learning rate, no weight decay."""
        return [self.logits]

    def parameters_of_model(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def gated_weights(self, gates: Tensor) -> dict[str, Tensor]:
        """The weights of all readers, multiplied by `gates` of shape (units,)."""
        factors = self._factors(gates)
        return {name: self._gated_weight(name, self.model.get_parameter(name), factors) for name in self._axes}

    def _factors(self, gates: Tensor) -> dict[tuple[str, int], Tensor]:
        """Per reader weight and axis the gate at each index, 1 where it is pinned; gathered at once for all."""
        gathered = torch.cat((gates, gates.new_ones(1)))[self._units]
        return dict(zip(self._lengths, gathered.split(list(self._lengths.values())), strict=True))

    def _gated_weight(self, name: str, weight: Tensor, factors: Mapping[tuple[str, int], Tensor]) -> Tensor:
        for axis in self._axes[name]:
            shape = [-1 if a == axis else 1 for a in range(weight.dim())]
            weight = weight * factors[name, axis].view(shape).to(weight.dtype)
        return weight

    def norm_counts(self, gates: Tensor) -> dict[str, Tensor]:
        """Which channels the norms over a width count: 1 where the gate of shape (units,) is open, 0 where closed.

        The value is binary whatever the gate is, as it is after the cut; its gradient is that of the gate, relative.
        """
        scale = torch.where(gates > 0, gates, 1.0)
        factors = torch.cat(((gates > 0) * scale / scale.detach(), gates.new_ones(1)))
        return {f"{name}.open": factors[getattr(self, f"norm_{i}")] for i, name in enumerate(self._norms)}

    def folded(self, keep: Tensor | None = None) -> nn.Module:
        """A plain copy of the network with the hard gates written into the weights.

        Norms over a width stay gated while channels are closed; a cut makes them plain.

        `keep`, a boolean of shape (units,), decides what is open instead of the logits: what it re-opens gets the
        smallest open gate, what it closes zero.
        """
        gates = self.hard().detach()
        if keep is not None:
            gates = with_open(gates) * keep.to(gates)
        plain = copy.deepcopy(self.model)
        with torch.no_grad():
            tensors = dict(plain.named_parameters())
            for name, weight in self.gated_weights(gates).items():
                tensors[name].copy_(weight)
            for name, counts in self.norm_counts(gates).items():
                norm = plain.get_submodule(name.removesuffix(".open"))
                norm.get_buffer("open").copy_(counts)
                ungate_(norm)
        return plain


def require_groups(graph: ChannelGraph) -> None:
    """Raises NothingToCut."""
    if not graph.groups:
        raise NothingToCut(
            "the network has no channel that may be removed",
            at=f"{len(graph.pinned)} pinned entries, first: {graph.pinned[0].reason if graph.pinned else 'none'}",
            effect="no gates were attached",
            fix="graph.summary() lists what is pinned and why",
        )


def with_open(gates: Tensor) -> Tensor:
    """`gates`, one a gate or one a unit, with the smallest open one in place of those that are closed, 1 if all are."""
    lowest = gates[gates > 0].min() if (gates > 0).any() else gates.new_ones(())
    return torch.where(gates > 0, gates, lowest)


def attach(
    model: nn.Module, graph: ChannelGraph, *, gate: str | Gate = "diffprune", bundles: Bundles = ()
) -> GatedModel:
    """A copy of `model` with gates on every free unit of `graph`, all open at first.

    Units in one of the `bundles` share a gate: `branches` drops whole residual branches.

    `gate` is a family by name ("diffprune", "diffprune-deterministic", "hard-concrete") or an object with the
    methods of `gates.Gate`. Raises NothingToCut, and BadModel for a network that is spread over devices.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise BadModel(
            f"the network is in a {type(model).__name__}, which copies it at every step, and the gates do not follow",
            at="diffprune.attach", effect="no gates were attached",
            fix="give what is in it, model.module, and wrap what comes out",
        )  # fmt: skip
    return GatedModel(model, graph, family(gate), bundles(graph) if callable(bundles) else bundles)


def _group_of_gates(graph: ChannelGraph, of: Tensor) -> Tensor:
    """The index of the group of each gate, shape (gates,); bundles are a group of their own."""
    sizes = torch.tensor([group.units for group in graph.groups])
    group = torch.arange(len(sizes)).repeat_interleave(sizes)
    first = torch.full((int(of.max()) + 1,), len(sizes)).scatter(0, of, group)
    return torch.where(of.bincount() > 1, len(sizes), first)
