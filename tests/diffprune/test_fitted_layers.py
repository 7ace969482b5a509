"""Which layers a cut network is fitted in: all that are linear, but those whose rows or owners leave no target."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer

import surgery
from diffprune.compensate import compensate_


class Mixer(nn.Module):
    """One block of an MLP-Mixer (Tolstikhin et al. 2021): a linear layer along the tokens, one along the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, channels, 2, stride=2), nn.LayerNorm(channels)
        self.tokens, self.back = nn.Linear(16, 32), nn.Linear(32, 16)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.back(self.tokens(self.norm(x).transpose(1, 2)).relu()).transpose(1, 2)
        return self.head((x + self.down(self.up(x).relu())).mean(1))


@pytest.mark.parametrize("channels", [24, 64])
def test_layers_that_mix_tokens_stay(channels: int) -> None:
    """Of these a cut takes rows: parent and cut network have no places in common to fit them at."""
    torch.manual_seed(0)
    model, x = Mixer(channels).eval(), torch.randn(64, 3, 8, 8)
    graph = surgery.trace(model, x[:2])
    keep = {group.name: torch.arange(group.units) < group.units * 3 // 4 for group in graph.groups}
    small = surgery.cut(model, graph, keep)
    before = {name: p.clone() for name, p in small.named_parameters()}
    compensate_(small, model, graph, keep, x)
    same = {name for name, p in small.named_parameters() if p.dim() > 1 and torch.equal(p, before[name])}
    assert {"tokens.weight", "back.weight"} <= same
    assert not {"up.weight", "down.weight", "head.weight"} & same


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.stem(x)).relu()))


def test_a_weight_with_two_owners_stays() -> None:
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(32, 3, 8, 8)
    graph = surgery.trace(model, x[:2])
    keep = {group.name: torch.arange(group.units) < group.units // 2 for group in graph.groups}
    small = surgery.cut(model, graph, keep)
    before = {name: p.clone() for name, p in small.named_parameters()}
    compensate_(small, model, graph, keep, x)
    assert torch.equal(small.a.weight, before["a.weight"])
    assert not torch.equal(small.head.weight, before["head.weight"])


def test_attention_is_fitted_as_any_linear_layer() -> None:
    """torchvision's Swin multiplies with its weights past their modules, and a cut attention has other operators."""
    torch.manual_seed(0)
    model, x = SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5).eval(), torch.randn(64, 3, 32, 32)
    graph = surgery.trace(model, x[:2])
    keep = {group.name: torch.arange(group.units) < (group.units + 1) // 2 for group in graph.groups}
    small = surgery.cut(model, graph, keep)
    before = {name: p.clone() for name, p in small.named_parameters()}
    with torch.no_grad():
        wanted, start = model(x), small(x)
        compensate_(small, model, graph, keep, x)
        assert (small(x) - wanted).norm() < (start - wanted).norm()
    linear = [name for name, p in small.named_parameters() if p.dim() == 2 and "relative" not in name]
    assert [name for name in linear if torch.equal(small.get_parameter(name), before[name])] == []
