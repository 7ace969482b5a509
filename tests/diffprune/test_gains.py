"""Gains: what a reader explains with a unit beyond the better ones, times the part of the reader in its stream."""

from itertools import pairwise

import pytest
import torch
from test_score import traced
from torch import Tensor, nn
from zoo import ZOO

import surgery
from diffprune.relevance import relevance
from diffprune.score import _falls, contribution, gains

GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.free])
def test_one_finite_gain_per_unit(name: str) -> None:
    model, graph, x = traced(name)
    found = gains(model, graph, x)
    assert found.shape == (graph.units,)
    assert found.dtype == torch.float64
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() > 0


def concat() -> tuple[nn.Module, surgery.ChannelGraph, Tensor]:
    """A reader of 3x3 kernels whose channels belong to two groups, with more places than columns."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(9, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat((self.a(x), self.b(x)), 1)
            return self.c(both.relu()).mean((2, 3))

    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(40, 3, 9, 9, generator=GENERATOR, dtype=torch.float64)
    return model, surgery.trace(model, x[:2]), x


def test_gains_are_the_falls_of_the_least_squares_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprune.score.RIDGE", 1e-9)
    model, graph, x = concat()
    found = surgery.SizeModel(graph).keep(gains(model, graph, x))
    shares = surgery.SizeModel(graph).keep(contribution(model, graph, x))
    read: list[Tensor] = []
    hook = model.get_submodule("c").register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        model(x)
        hook.remove()
        columns = nn.functional.unfold(read[0], 3).transpose(1, 2).reshape(-1, 9, 9)
        given = columns.flatten(1) @ model.get_parameter("c.weight").flatten(1).T
    given = given - given.mean(0)
    order = shares["a"].argsort(descending=True)
    errors = []
    for n in range(6):
        kept = torch.cat((order[:n], torch.arange(5, 9)))
        some = columns[:, kept].flatten(1)
        some = some - some.mean(0)
        left = given - some @ torch.linalg.lstsq(some, given).solution
        errors.append(float(left.square().sum() / given.square().sum()))
    assert errors == sorted(errors, reverse=True)
    falls = _falls(torch.tensor(errors))
    assert torch.allclose(found["a"][order], falls, rtol=0.1, atol=0.01)  # 32 places of an image, here all
    assert found["a"].sum() == pytest.approx(errors[0], rel=0.02)


def test_falls_are_those_of_the_lower_convex_hull() -> None:
    falls = _falls(torch.tensor([1.0, 0.9, 0.1, 0.0]))
    assert torch.allclose(falls, torch.tensor([0.45, 0.45, 0.1]).double(), rtol=1e-3)
    falls = _falls(torch.rand(30, generator=GENERATOR).sort(descending=True).values)
    assert all(a > b for a, b in pairwise(falls.tolist()))


class Branches(nn.Module):
    """A stream with a bottleneck of two layers and a branch that a normalisation scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.a, self.b, self.c = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 8, 1)
        self.d, self.e = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.c(self.b(self.a(x).relu()).relu())
        x = x + self.norm(self.e(self.d(x).relu()))
        return self.head(x.mean((2, 3)))


def branches(scale: float) -> tuple[nn.Module, surgery.ChannelGraph, Tensor]:
    torch.manual_seed(0)
    model = Branches().double().eval()
    model.norm.weight.data.fill_(scale)
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, surgery.trace(model, x[:2]), x


def test_a_layer_is_as_relevant_as_its_part_in_the_sum() -> None:
    model, graph, x = branches(0.3)
    found = relevance(model, graph, x)
    with torch.no_grad():
        stream = model.stem(x)
        branch = model.c(model.b(model.a(stream).relu()).relu())

        def variance(value: Tensor) -> float:
            return float(value.var((0, 2, 3), correction=0).sum())

        part = variance(branch) / variance(stream + branch)
    assert found["c.weight"] == pytest.approx(part, rel=1e-5)
    assert found["a.weight"] == found["b.weight"] == found["c.weight"]
    assert found["d.weight"] == found["e.weight"] < 1
    assert found["head.weight"] == 1
    assert found["stem.weight"] == pytest.approx(variance(stream) / variance(stream + branch), rel=1e-5)


def test_a_fainter_branch_gains_less() -> None:
    loud, faint = (surgery.SizeModel(case[1]).keep(gains(*case)) for case in (branches(1.0), branches(0.1)))
    assert (faint["d"] < 0.05 * loud["d"]).all()
    assert torch.allclose(faint["a"], loud["a"])


def test_values_that_are_no_numbers_come_through() -> None:
    model, graph, x = branches(1.0)
    assert not gains(model, graph, x * float("nan")).isfinite().all()
