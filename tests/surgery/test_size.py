"""Predicted size against counted size, and the expected size against the mean over every keep."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from counting import macs, params
from oracle import random_keep
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import DeformConv2d
from zoo import traced

import surgery
from surgery import ChannelGraph, SizeModel

COUNTED = (
    "plain", "residual", "concat_then_add", "dense_concat", "self_concat", "chunk_gate", "flatten_to_linear",
    "depthwise", "grouped", "transposed", "conv_1d_3d", "shared_module", "tied_weight", "bare_scale",
    "constant_shortcut", "two_heads", "layer_norm_mlp", "two_inputs",
    "c2f", "functional_conv", "class_token", "unused", "nothing_free", "token_mixing", "remembered_heads",
    "group_norms",
)


class Tiny(nn.Sequential):
    """Four filters, three filters, two neurons: 512 keeps."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2),
            nn.Linear(2, 3),
        )


def tiny() -> tuple[ChannelGraph, SizeModel]:
    graph = surgery.trace(Tiny(), torch.randn(2, 1, 5, 5))
    return graph, SizeModel(graph)


@pytest.mark.parametrize("name", COUNTED)
def test_predicted_size_is_the_counted_size_of_the_cut_network(name: str) -> None:
    model, graph, x = traced(name)
    size = SizeModel(graph)
    assert size.dense == surgery.Size(params(model), macs(model, x))
    for seed in range(3):
        keep = random_keep(graph, seed)
        small = surgery.cut(model, graph, keep)
        assert size.of(keep) == surgery.Size(params(small), macs(small, x))


class Gained(nn.Module):
    """A convolution whose weight the forward computes, between two that are layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)
        self.weight, self.gain = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.rand(8, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.a(x).relu(), self.weight * self.gain, padding=1)
        return self.head(self.b(x).relu().mean((2, 3)))


class Deciding(Gained):
    """The same, decided by values: a black box, which runs the convolution itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(F.conv2d(-x if x.mean() > 100 else x, self.weight)).mean((2, 3)))


def parametrized(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), norm(nn.Conv2d(8, 8, 3)), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(),
        norm(nn.ConvTranspose2d(8, 6, 2)), nn.Flatten(), norm(nn.Linear(6 * 6 * 6, 5)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [Gained(), Deciding(), parametrized(parametrizations.weight_norm), parametrized(parametrizations.spectral_norm)],
    ids=["computed", "black box", "weight_norm", "spectral_norm"],
)
def test_a_layer_that_is_not_followed_has_its_multiply_adds_all_the_same(model: nn.Module) -> None:
    """Else a budget would be met on paper, with most of the cost in what was not counted."""
    x = torch.randn(2, 3, 9, 9)
    graph = surgery.trace(model.eval(), x)
    size = SizeModel(graph)
    assert sum(graph.fixed.values()) > 0
    assert size.dense == surgery.Size(params(model), macs(model, x))
    keep = random_keep(graph, 0)
    assert size.of(keep).macs == macs(surgery.cut(model, graph, keep), x)


class Rare(nn.Module):
    """Layers that no rule follows, and torch's own counter does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.offset = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 18, 3, padding=1)
        self.deform, self.pair = DeformConv2d(6, 5, 3, padding=1), nn.Bilinear(5, 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.deform(x, self.offset(x)).mean((2, 3))
        return self.pair(x, x)


def test_deformable_and_bilinear_layers_count() -> None:
    graph = surgery.trace(Rare().eval(), torch.randn(2, 3, 4, 4))
    assert graph.fixed == {"deform": 16 * 6 * 5 * 9, "pair": 5 * 5 * 4}


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, True)])
def test_all_matrices_of_a_recurrent_layer_count(kind: Any, gates: int, layers: int, both: bool) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 10)
            self.cells = kind(10, 7, layers, batch_first=True, bidirectional=both)

        def forward(self, x: Tensor) -> Tensor:
            return self.cells(self.first(x).relu())[0]

    ways = 2 if both else 1
    read = [10] + [7 * ways] * (layers - 1)
    expected = 9 * (6 * 10 + sum(ways * gates * 7 * (n + 7) for n in read))
    assert SizeModel(surgery.trace(Steps(), torch.randn(2, 9, 6))).dense.macs == expected


def test_expected_size_is_the_mean_over_all_keeps() -> None:
    _, size = tiny()
    assert size.units == 9
    chances = torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean_params = mean_macs = 0.0
    for bits in product((0.0, 1.0), repeat=9):
        open_ = torch.tensor(bits, dtype=torch.float64)
        weight = torch.where(open_ == 1, chances, 1 - chances).prod().item()
        mean_params += weight * size.params(open_).item()
        mean_macs += weight * size.macs(open_).item()
    assert size.params(chances).item() == pytest.approx(mean_params, rel=1e-12)
    assert size.macs(chances).item() == pytest.approx(mean_macs, rel=1e-12)


def test_the_gradient_is_the_derivative() -> None:
    _, size = tiny()
    chances = torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(size.params, (chances,), rtol=1e-7)
    assert torch.autograd.gradcheck(size.macs, (chances,), rtol=1e-7)


def test_zeros_and_ones_are_exact_by_hand() -> None:
    graph, size = tiny()
    # 9 pixels: 4 * 9 * 9, 3 * 4 * 9; then 2 * 3 and 3 * 2
    assert size.dense == surgery.Size(4 * 9 + 4 + 3 * 4 + 3 + 2 * 3 + 2 + 3 * 2 + 3, 324 + 108 + 6 + 6)
    keep = {graph.groups[0].name: torch.tensor([True, False, False, True])}
    assert size.of(keep) == surgery.Size(2 * 9 + 2 + 3 * 2 + 3 + 2 * 3 + 2 + 3 * 2 + 3, 162 + 54 + 6 + 6)


def test_a_keep_and_its_flat_vector_are_the_same() -> None:
    graph, size = tiny()
    keep = random_keep(graph, 3)
    back = size.keep(size.flat(keep))
    assert all(torch.equal(back[name], keep[name]) for name in keep)
    with pytest.raises(surgery.BadKeep, match="does not have: nobody"):
        size.of({"nobody": torch.ones(2, dtype=torch.bool)})
