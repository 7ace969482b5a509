"""Scores of units before any search: where the logits start."""

import torch
from torch import Tensor, nn

from surgery import ChannelGraph


def magnitude(model: nn.Module, graph: ChannelGraph) -> Tensor:
    """L2 norm of the weights that write and read each unit, relative to the group's mean, averaged over the layers.

    Shape (units,), at least 0, float64; flat in the order of `SizeModel`. Relative norms make layers comparable.
    """
    tensors = dict(model.named_parameters())
    scores = []
    for group in graph.groups:
        parts = []
        for slot in group.slots:
            if slot.role != "carry" and slot.tensor in tensors:
                weight = tensors[slot.tensor].detach().double().cpu().movedim(slot.axis, 0)
                norm = weight.square().flatten(1).sum(1)[slot.positions].sum(1).sqrt()
                parts.append(norm / norm.mean().clamp_min(1e-12))
        scores.append(torch.stack(parts).mean(0))
    return torch.cat(scores) if scores else torch.empty(0)


def as_logits(scores: Tensor) -> Tensor:
    """Logits in the order of `scores`: their logarithm, standardised over the network, within +-4; 0 comes last."""
    logs = scores.clamp_min(1e-6).log()
    return ((logs - logs.mean()) / logs.std(correction=0).clamp_min(1e-6)).clamp(-4, 4).float()
