"""Gates on single weights: an unstructured search, after which surgery removes the units that nobody reads any more."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffprune.budget import ROUNDING, Budget, shift_for
from diffprune.errors import NothingToCut
from diffprune.gated import with_open
from diffprune.gates import Gate, GatedModule, family
from diffprune.products import places_of, products
from diffprune.score import as_logits
from surgery.rebuilding import copied

MULTIPLYING = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.MultiheadAttention)
"""Layers whose single weights can be left out."""


def _matrices(layer: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters(recurse=False) if p.dim() > 1 and "weight" in name]


class WeightCount:
    """The cost of single weights: each counts one, whatever the budget is on."""

    def params(self, open_: Tensor) -> Tensor:
        return open_.double().sum()

    macs = params


class SparseModel(GatedModule):
    """`model` with W * gate for every matrix and kernel W of its layers (MULTIPLYING); a new sample per forward in
    training, hard in eval. What else has several axes, such as the scale of a layer or a table of positions, has none.

    `logits` is one flat parameter, shape (weights,), float32, which starts from the magnitudes relative to their layer.
    """

    shift: Tensor

    def __init__(self, model: nn.Module, gate: str | Gate = "diffprune") -> None:
        super().__init__()
        self.model, self.gate = copied(model), family(gate)
        owned = {id(p) for layer in self.model.modules() if isinstance(layer, MULTIPLYING) for p in _matrices(layer)}
        weights = {name: p for name, p in self.model.named_parameters() if id(p) in owned and p.requires_grad}
        if not weights:
            raise NothingToCut(
                "the network has no weight matrix that is trained",
                at=type(model).__name__,
                effect="no gates were attached",
                fix="set requires_grad on the layers that may become sparse",
            )
        self._places = places_of(self.model, weights)
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        scores = [
            (w.detach().abs() / w.detach().square().mean().sqrt().clamp_min(1e-12)).flatten() for w in weights.values()
        ]
        self.logits = nn.Parameter(as_logits(torch.cat(scores)))
        sizes = torch.tensor([weight.numel() for weight in weights.values()])
        self.register_buffer("group", torch.arange(len(sizes)).repeat_interleave(sizes).to(self.logits.device))
        self.register_buffer("shift", torch.zeros((), device=self.logits.device))
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            gates = self.gate.sample(self.logits + self.shift, self.get_buffer("group"))
        else:
            gates = self.gate.hard(self.logits + self.shift)
        parts = self._parts(gates)
        weights = {name: self.model.get_parameter(name) for name in parts}
        with products(weights, self._places, lambda name: weights[name] * parts[name].to(weights[name].dtype)) as gated:
            return functional_call(self.model, gated, args, kwargs, tie_weights=False)

    def follow_(self, share: float) -> None:
        """Set the shift so that a `share` of the weights is expected to be open."""
        logits = self.logits.detach()
        budget, size = Budget(params=share), WeightCount()
        self.shift.fill_(shift_for(budget, size, self.gate, logits, share, float(self.shift)))

    def folded(self, share: float) -> nn.Module:
        """A plain copy with zeros in place of all but the best `share` of the gated weights, to the weight.

        The others are multiplied by their hard gates, those that this opens by the smallest open one.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share is above 0 and at most 1; got {share}")
        best = self.logits.detach().topk(max(int(share * self.logits.numel() * (1 + ROUNDING)), 1)).indices
        keep = torch.zeros_like(self.logits).index_fill(0, best, 1.0)
        gates = with_open(self.gate.hard(self.logits + self.shift).detach()) * keep
        plain = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, part in self._parts(gates).items():
                plain.get_parameter(name).mul_(part)
        return plain

    def _parts(self, gates: Tensor) -> dict[str, Tensor]:
        pieces = gates.split([shape.numel() for shape in self._shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}
