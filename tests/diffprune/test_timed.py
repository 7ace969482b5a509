"""Predicted latency: with a table that is a known function of widths, that function of the network that is cut."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import randomised

import export
import surgery
from diffprune import timing
from diffprune.budget import Budget
from diffprune.errors import BadBudget
from diffprune.landing import land, least
from diffprune.timed import Grid, TimedSize, _surface
from export import LayerKind, Widths


class Mixed(nn.Module):
    """A stream with a branch, a depthwise and a grouped convolution, tokens through a linear layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.a, self.b = nn.Conv2d(24, 32, 1), nn.Conv2d(32, 24, 3, padding=1)
        self.deep, self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 32, 1, groups=2)
        self.tokens, self.head = nn.Linear(32, 40), nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.b(self.a(x).relu())
        x = self.grouped(self.deep(x).relu()).relu()
        return self.head(self.tokens(x.flatten(2).transpose(1, 2)).relu().mean(1))


def product(wanted: Mapping[LayerKind, list[Widths]], *_: object, **__: object) -> dict[tuple[LayerKind, Widths], Any]:
    """Milliseconds that are a product of the widths: linear between any two widths of either."""
    return {(kind, pair): 1e-3 * pair[0] * pair[1] for kind, pairs in wanted.items() for pair in pairs}


@cache
def timed() -> tuple[nn.Module, surgery.ChannelGraph, TimedSize, Tensor]:
    torch.manual_seed(0)
    model, x = randomised(Mixed()).eval(), torch.randn(2, 3, 8, 8)
    graph = surgery.trace(model, x)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "layer_table", product)
        file = export.to_onnx(model, x, Path(folder) / "dense.onnx")
        return model, graph, timing.timed_file(file.path, graph, step=8), x


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (2, 3))])
def test_each_layer_costs_what_the_table_says_of_its_width_after_the_cut(seed: int, tmp_path: Path) -> None:
    model, graph, size, x = timed()
    generator = torch.Generator().manual_seed(seed)
    flat = torch.rand(size.units, generator=generator) < 0.6
    keep = size.keep(flat)
    keep = {name: flags if flags.any() else torch.ones_like(flags) for name, flags in keep.items()}
    file = export.to_onnx(surgery.cut(model, graph, keep), x, tmp_path / "small.onnx")
    cut, _ = export.layers_of(file.path, runs=1)
    predicted = size.per_layer(size.widths(size.flat(keep).double()))
    assert len(cut) == len(size.layers) == 7
    left = {layer.weight: layer.widths for layer in cut}
    for layer, ms in zip(size.layers, predicted.tolist(), strict=True):
        (i, o), (a, b) = layer.timed.widths, left[layer.timed.weight]
        share = a * b / (i * o)
        if layer.timed.kind.groups == 0:  # one width: between two that were measured, its square is a chord
            share = np.interp(a, [0, 8, 16, 24], [0, 8**2, 16**2, 24**2]) / 24**2
        assert ms == pytest.approx(layer.timed.ms * share, rel=1e-9), layer.timed.weight


def test_the_dense_network_costs_what_its_profile_says() -> None:
    _, _, size, _ = timed()
    ones = torch.ones(size.units)
    assert float(size.latency(ones)) == pytest.approx(sum(layer.timed.ms for layer in size.layers) + size.rest_ms)
    assert size.rest_ms > 0


def test_latency_falls_with_every_chance_and_its_gradient_is_the_slope() -> None:
    _, _, size, _ = timed()
    chance = torch.full((size.units,), 0.61, dtype=torch.float64, requires_grad=True)
    size.latency(chance).backward()
    assert (chance.grad > 0).all()
    step = 1e-3 * torch.randn(size.units, generator=torch.Generator().manual_seed(0)).double()
    moved = size.latency(chance.detach() + step) - size.latency(chance.detach() - step)
    assert float(moved) == pytest.approx(float(2 * step @ chance.grad), rel=1e-3)


def test_a_branch_that_is_closed_altogether_takes_no_time_and_may_be(tmp_path: Path) -> None:
    model, graph, size, x = timed()
    assert size.drops == {"a": ()}
    closed = {"a": torch.zeros(32, dtype=torch.bool)}
    file = export.to_onnx(surgery.cut(model, graph, closed), x, tmp_path / "small.onnx")
    left = {layer.weight for layer in export.layers_of(file.path, runs=1)[0]}
    predicted = size.per_layer(size.widths(size.flat(closed).double()))
    assert {layer.timed.weight for layer, ms in zip(size.layers, predicted, strict=True) if ms} == left
    assert {"a.weight", "b.weight"}.isdisjoint(left)

    scores = torch.cat([torch.full((g.units,), 0.0 if g.name == "a" else 1.0) for g in graph.groups])
    share = float(Budget(speedup=2.0).cost(size, size.flat(closed).double()))
    assert torch.equal(land(Budget(speedup=1 / share), size, scores).flat, size.flat(closed))
    share = float(Budget(macs=1.0).cost(size, size.flat(closed).double()))
    plain = surgery.SizeModel(graph)
    kept = plain.keep(land(Budget(macs=share + 0.05), plain, scores).flat)
    assert kept["a"].any(), "in torch one unit stays, and has its multiply-adds"


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = (
            nn.Conv2d(*widths, 3, padding=1) for widths in ((3, 16), (16, 8), (8, 24), (24, 16))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return (x + self.c(self.b(self.a(x).relu()).relu())).mean((2, 3))


def test_a_larger_batch_costs_what_its_images_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Bottleneck().eval(), torch.randn(2, 3, 32, 32)
    asked: list[object] = []
    monkeypatch.setattr(export, "layer_table", lambda wanted, s, **how: asked.append(s.batch) or product(wanted))
    file, graph = export.to_onnx(model, x, tmp_path / "dense.onnx").path, surgery.trace(model, x)
    one, eight = (timing.timed_file(file, graph, step=8, settings=export.Settings(batch=batch)) for batch in (1, 8))
    assert asked == [1, 8]
    assert [8 * values for layer in one.layers for values in layer.values] == [
        values for layer in eight.layers for values in layer.values
    ]
    whole = torch.ones(one.units)
    assert eight.latency(whole) > 3 * one.latency(whole)


def test_what_leads_only_to_a_closed_branch_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Bottleneck().eval(), torch.randn(2, 3, 8, 8)
    graph = surgery.trace(model, x)
    monkeypatch.setattr(export, "layer_table", product)
    size = timing.timed_file(export.to_onnx(model, x, tmp_path / "dense.onnx").path, graph, step=8)
    assert size.drops == {"b": ("a",)}
    scores = torch.cat([torch.full((g.units,), 0.0 if g.name == "b" else 1.0) for g in graph.groups])
    closed = size.flat({name: torch.zeros(graph.by_name[name].units, dtype=torch.bool) for name in "ab"})
    budget = Budget(speedup=1 / float(Budget(speedup=2.0).cost(size, closed.double())))
    assert torch.equal(land(budget, size, scores).flat, closed)
    assert not size.keep(least(size))["a"].any()
    file = export.to_onnx(surgery.cut(model, graph, size.keep(closed)), x, tmp_path / "small.onnx")
    assert [layer.weight for layer in export.layers_of(file.path, runs=1)[0]] == ["stem.weight"]


def test_a_speed_up_needs_a_size_that_knows_milliseconds() -> None:
    _, graph, size, _ = timed()
    half = torch.full((size.units,), 0.5)
    assert 0 < float(Budget(speedup=2.0).cost(size, half)) < 1
    with pytest.raises(BadBudget, match=r"whose latency is not known[\s\S]*timed_file"):
        Budget(speedup=2.0).cost(surgery.SizeModel(graph), half)


class Products(nn.Module):
    """A linear layer that runs twice, another of its shape, and a weight that is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(32, 3)
        self.w = nn.Parameter(torch.randn(16, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.a(x).relu()).relu()).relu()
        return self.head((x @ self.w).relu()).mean(1)


def test_products_are_placed_where_the_network_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "layer_table", product)
    torch.manual_seed(0)
    model, x = Products().eval(), torch.randn(2, 5, 16)
    file = export.to_onnx(model, x, tmp_path / "products.onnx")
    size = timing.timed_file(file.path, surgery.trace(model, x), step=8)
    assert [layer.timed.weight for layer in size.layers] == ["a.weight", "a.weight", "b.weight", "w", "head.weight"]
    for layer in size.layers:
        shape = model.get_parameter(layer.timed.weight).shape
        assert tuple(shape[axis] for _, axis in layer.axes) == layer.timed.widths
    assert [[axis for _, axis in layer.axes] for layer in size.layers[2:]] == [[1, 0], [0, 1], [1, 0]]


def test_without_a_layer_that_is_known_no_speed_up_can_be_asked(tmp_path: Path) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).mean((2, 3))

    model, x = Functional().eval(), torch.randn(2, 3, 8, 8)
    file = export.to_onnx(model, x, tmp_path / "functional.onnx")
    with pytest.raises(BadBudget, match="no layer of the network was found"):
        timing.timed_file(file.path, surgery.trace(model, x), step=8)


def test_noise_in_a_narrower_cell_of_the_table_leaves_the_dense_layer_what_it_is() -> None:
    kind, grid = LayerKind("Conv", (3, 3), (), 1, (8, 8)), Grid((8, 16), (8, 16))
    layer = export.TimedLayer(kind, (16, 16), "w", (1, 16, 6, 6), 1.0)
    noisy = {(kind, pair): 1.0 for pair in grid.pairs(kind)} | {(kind, (16, 8)): 1.3}
    assert _surface(layer, grid, noisy, 4)[2, 2] == 1.0
