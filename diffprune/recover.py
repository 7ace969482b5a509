"""After a cut: normalisation statistics, and what the network can still do."""

from itertools import islice

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffprune.errors import BadData
from diffprune.training import Batches, unpack
from surgery import evaluating


def recalibrate_(model: nn.Module, batches: Batches, *, limit: int = 50) -> None:
    """Re-estimate the BatchNorm statistics of a cut network from up to `limit` batches, without training.

    A cut shifts what every later layer sees; new statistics alone recover 15 to 40 points of accuracy in a second.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    device = next(model.parameters()).device
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad(), evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        for batch in islice(batches, limit):
            model(unpack(batch, device)[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def accuracy(model: nn.Module, batches: Batches) -> tuple[float, int]:
    """Share of right answers in [0, 1] and the number of examples, in eval mode. Raises BadData without labels."""
    device = next(model.parameters()).device
    right = count = 0
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            inputs, labels = unpack(batch, device)
            if labels is None:
                raise BadData(
                    "the validation batches have no labels",
                    at="measuring accuracy",
                    effect="no accuracy can be reported",
                    fix="give (inputs, labels) batches for validation; training may go without",
                )
            right += int((model(inputs).argmax(1) == labels).sum())
            count += len(labels)
    if not count:
        raise BadData(
            "the validation data is empty",
            at="measuring accuracy",
            effect="nothing was measured",
            fix="give at least one validation batch",
        )
    return right / count, count
