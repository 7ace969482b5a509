"""What units are worth may be told by torch-pruning's criteria or by a function of the user's."""

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import surgery
from diffprune import Budget, compress, criterion_scores
from diffprune.errors import BadData

MAGNITUDE = tp.importance.GroupMagnitudeImportance(normalizer=None)


class Small(nn.Module):
    """Two hidden layers of equal cost per unit; only the first has a batch norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b, self.head = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).relu()).relu().amax((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 1, 8, 8, generator=draw), torch.arange(16) % 3) for _ in range(4)]


def chosen(model: nn.Module, scores: Any) -> dict[str, list[int]]:
    result = compress(model, batches(0), batches(1), budget=Budget(macs=0.5), epochs=0, scores=scores)
    return {name: flags.nonzero().flatten().tolist() for name, flags in result.keep.items()}


def best(scores: Tensor, count: int) -> list[int]:
    return sorted(scores.argsort(descending=True)[:count].tolist())


def test_a_criterion_of_torch_pruning_ranks_the_units(model: nn.Module) -> None:
    norms = {
        "a": model.a.weight.flatten(1).square().sum(1) + model.norm.weight.square()
        + model.b.weight.transpose(0, 1).flatten(1).square().sum(1),
        "b": model.b.weight.flatten(1).square().sum(1) + model.head.weight.square().sum(0),
    }  # fmt: skip
    kept = chosen(model, criterion_scores(MAGNITUDE))
    for name, units in kept.items():
        assert units == best(norms[name], len(units)), name
    assert 2 <= sum(map(len, kept.values())) < 24
    assert kept != chosen(model, criterion_scores(lambda group: -MAGNITUDE(group) + 100))


def test_a_criterion_that_finds_no_gradients_says_what_to_do(model: nn.Module) -> None:
    criterion = tp.importance.GroupTaylorImportance()
    with pytest.raises(BadData, match=r"GroupTaylorImportance finds no gradients(.|\n)*loss\.backward\(\)"):
        compress(model, batches(0), batches(1), budget=Budget(macs=0.5), epochs=0, scores=criterion_scores(criterion))


def test_a_function_of_the_users_is_given_network_graph_and_images(model: nn.Module) -> None:
    told: list[tuple[int, ...]] = []

    def scores(network: nn.Module, graph: surgery.ChannelGraph, images: Tensor) -> Tensor:
        told.append(tuple(images.shape))
        assert torch.equal(network.a.weight, model.a.weight)
        return torch.arange(sum(group.units for group in graph.groups)).double()

    kept = chosen(model, scores)
    assert told == [(64, 1, 8, 8)]
    for units in kept.values():
        assert units == list(range(12 - len(units), 12))


def test_what_a_criterion_cannot_score_gets_the_mean(model: nn.Module) -> None:
    with torch.no_grad():
        model.norm.weight.copy_(torch.arange(12.0, 0.0, -1.0))
    scores = criterion_scores(tp.importance.BNScaleImportance())(model, surgery.trace(model, torch.ones(2, 1, 8, 8)), 0)
    assert scores[:12].argsort().tolist() == list(range(11, -1, -1))
    assert scores[12:].tolist() == pytest.approx([float(scores[:12].mean())] * 12)
    model.norm = nn.Identity()
    with pytest.raises(BadData, match="BNScaleImportance scores no group"):
        chosen(model, criterion_scores(tp.importance.BNScaleImportance()))


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (torch.ones(7), r"24 units got scores of shape \(7,\)"),
        (torch.arange(24) - 1.0, "the least -1"),
        (torch.ones(0), r"24 units got scores of shape \(0,\)"),
        (torch.full((24,), torch.inf), "not finite"),
    ],
)
def test_bad_scores_are_refused(model: nn.Module, scores: Tensor, words: str) -> None:
    with pytest.raises(BadData, match=words):
        chosen(model, lambda network, graph, images: scores)
