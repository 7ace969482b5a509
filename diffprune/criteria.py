"""torch-pruning's importance criteria as the scores that a search starts from."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffprune.errors import BadData
from surgery import ChannelGraph, ExampleInputs
from surgery.bridge import Criterion, importance


def criterion_scores(criterion: Criterion) -> Callable[[nn.Module, ChannelGraph, ExampleInputs], Tensor]:
    """Scores of units by one of torch-pruning's importance criteria, for `compress(scores=...)`.

    `criterion_scores(tp.importance.GroupMagnitudeImportance())` scores by magnitude, for example. Criteria that read
    gradients find none: a function of yours can fill them in and then call what this returns. Groups that the criterion
    cannot score, such as layers without batch norm by BNScaleImportance, get the mean of the others.
    """

    def scores(model: nn.Module, graph: ChannelGraph, inputs: ExampleInputs) -> Tensor:
        try:
            found = importance(model, graph, criterion)
        except (AttributeError, KeyError) as error:
            raise BadData(
                f"{type(criterion).__name__} finds no gradients, or none of what else it reads: {error!r}",
                at="the scores of units",
                effect="nothing was started",
                fix="give a function of yours that fills them in (loss.backward()) and then calls what this returned",
            ) from error
        if not found:
            raise BadData(
                f"{type(criterion).__name__} scores no group of the network",
                at="the scores of units",
                effect="nothing was started",
                fix="choose a criterion that reads what the network has, such as GroupMagnitudeImportance",
            )
        mean = torch.cat([*found.values()]).mean()
        parts = [found.get(group.name, mean.expand(group.units)) for group in graph.groups]
        return torch.cat(parts).detach().double().cpu()

    return scores
