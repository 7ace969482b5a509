"""Gains: what a reader explains with a unit beyond the better ones, times the part of the reader in its stream."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, traced

import surgery
from diffprune.gains import Problem, _factors, _weights, eliminate, falls, gains
from diffprune.relevance import relevance

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


def rows(units: int, kernel: int, others: int) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs of `units` and of `others`, what a layer gives, and the columns of each unit."""
    generator = torch.Generator().manual_seed(units)
    count = units * kernel + others
    read = torch.randn(300, count, generator=generator) @ torch.randn(count, count, generator=generator)
    given = read @ torch.randn(count, 4, generator=generator) + torch.randn(300, 4, generator=generator)
    return read - read.mean(0), given - given.mean(0), torch.arange(units * kernel).view(units, kernel) + others


def left(read: Tensor, given: Tensor, columns: Tensor, kept: list[int]) -> float:
    """The share of `given` that the kept units and the other columns leave, by torch's least squares."""
    used = torch.ones(read.shape[1], dtype=torch.bool).index_fill(0, columns.flatten(), False)
    used[columns[kept].flatten()] = True
    some = read[:, used].double()
    rest = given.double() - (some @ torch.linalg.lstsq(some, given.double()).solution if used.any() else 0)
    return float(rest.square().sum() / given.double().square().sum())


@pytest.mark.parametrize(("units", "kernel", "others"), [(6, 1, 0), (5, 9, 0), (4, 3, 7), (40, 2, 3)])
def test_elimination_takes_what_costs_least_and_knows_what_is_left(
    units: int, kernel: int, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffprune.gains.RIDGE", 1e-10)
    read, given, columns = rows(units, kernel, others)
    order, errors = eliminate(*_weights(read, given, torch.empty(0), columns))
    assert sorted(order.tolist()) == list(range(units))
    for n in range(units + 1) if units < 20 else (0, 1, 8, 15, units):  # of 32 and more, several go in a round
        assert errors[n] == pytest.approx(left(read, given, columns, order[:n].tolist()), rel=1e-4, abs=1e-6)
    kept = order.tolist()
    while len(kept) > 1 and units < 20:
        costs = [left(read, given, columns, [u for u in kept if u != unit]) for unit in kept]
        assert min(costs) == pytest.approx(costs[-1], rel=1e-6)
        kept.pop()


def test_factors_are_those_of_what_units_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprune.gains.RIDGE", 1e-10)
    read, _, columns = rows(6, 3, 4)
    weight = torch.randn(5, read.shape[1], generator=GENERATOR)
    parts = torch.stack([(read[:, unit] @ weight[:, unit].T).flatten() for unit in columns], 1)
    given = read[:, 4:] @ weight[:, 4:].T  # the other columns give nothing
    order, errors = eliminate(*_factors(read, given, weight, columns))
    for n in range(7):
        expected = left(parts, given.reshape(-1, 1), torch.arange(6)[:, None], order[:n].tolist())
        assert errors[n] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_few_rows_are_met_by_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, x = branches(1.0)
    free = surgery.SizeModel(graph).keep(gains(model, graph, x))
    monkeypatch.setattr("diffprune.gains.ROWS", 1000)
    bound = surgery.SizeModel(graph).keep(gains(model, graph, x))
    assert not torch.allclose(free["d"], bound["d"])
    assert (free["d"].argmax() == bound["d"].argmax()).all()
    assert bound["d"].sum() == pytest.approx(float(free["d"].sum()), rel=0.2)


def test_dead_units_go_first_and_cost_nothing() -> None:
    read, given, columns = rows(40, 2, 0)
    read[:, columns[30:].flatten()] = 0
    order, errors = eliminate(*_weights(read, given, torch.empty(0), columns))
    assert set(order[30:].tolist()) == set(range(30, 40))
    assert errors[30:].max() - errors[-1] < 1e-9
    assert errors.min() > 0
    assert errors.max() == pytest.approx(1, abs=0.01)


def test_a_reader_of_two_groups_keeps_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(9, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat((self.a(x), self.b(x)), 1)
            return self.c(both.relu()).mean((2, 3))

    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(40, 3, 9, 9, generator=GENERATOR, dtype=torch.float64)
    graph, heard = surgery.trace(model, x[:2]), []

    def seen(read: Tensor, given: Tensor, weight: Tensor, columns: Tensor) -> Problem:
        heard.append((read.shape, columns))
        return _weights(read, given, weight, columns)

    monkeypatch.setattr("diffprune.gains._weights", seen)
    found = surgery.SizeModel(graph).keep(gains(model, graph, x))
    (shape, first), (_, second) = heard
    assert shape == (40 * 25, 81)
    assert torch.equal(first.flatten(), torch.arange(45))
    assert torch.equal(second.flatten(), torch.arange(45, 81))
    assert 0 < found["a"].sum() < 1
    assert 0 < found["b"].sum() < 1


def test_falls_are_those_of_the_lower_convex_hull() -> None:
    found = falls(torch.tensor([1.0, 0.9, 0.1, 0.0]))
    assert torch.allclose(found, torch.tensor([0.45, 0.45, 0.1]).double(), rtol=1e-3)
    found = falls(torch.rand(30, generator=GENERATOR).sort(descending=True).values)
    assert all(a > b for a, b in pairwise(found.tolist()))


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


def test_attention_is_as_relevant_as_its_part_in_the_stream() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))

    torch.manual_seed(0)
    model, x = Block().double().eval(), torch.randn(4, 5, 8, dtype=torch.float64, generator=GENERATOR)
    graph = surgery.trace(model, x)
    found = relevance(model, graph, x)
    with torch.no_grad():
        attention = model.attention(x, x, x, need_weights=False)[0]
    part = float(attention.var((0, 1), correction=0).sum() / (x + attention).var((0, 1), correction=0).sum())
    assert found["attention.out_proj.weight"] == pytest.approx(part, rel=1e-5)


class Tokens(nn.Module):
    """Two branches with dropout on a stream of tokens, with any number of axes before the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 12)
        self.c, self.d = nn.Linear(12, 20), nn.Linear(20, 12)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.b(self.a(x).relu()))
        x = x + self.drop(self.d(self.c(x).relu()))
        return self.head(x.flatten(1, -2).mean(1))


def test_tokens_are_as_relevant_on_a_grid_as_in_a_row_and_behind_dropout() -> None:
    torch.manual_seed(0)
    model, x = Tokens().double().eval(), torch.randn(8, 12, 12, dtype=torch.float64, generator=GENERATOR)
    model.b.bias.data[0] = 10.0
    found = [relevance(model, surgery.trace(model, y[:2]), y) for y in (x, x.unflatten(1, (3, 4)))]
    for name, share in found[0].items():
        assert found[1][name] == pytest.approx(share, rel=1e-6)
    with torch.no_grad():
        branch = model.b(model.a(x).relu())
        part = float(branch.var((0, 1), correction=0).sum() / (x + branch).var((0, 1), correction=0).sum())
    assert found[0]["b.weight"] == pytest.approx(part, rel=1e-5)
    assert found[0]["b.weight"] < 1


def test_a_fainter_branch_gains_less() -> None:
    loud, faint = (surgery.SizeModel(case[1]).keep(gains(*case)) for case in (branches(1.0), branches(0.1)))
    assert (faint["d"] < 0.05 * loud["d"]).all()
    assert torch.allclose(faint["a"], loud["a"])


def test_values_that_are_no_numbers_come_through() -> None:
    model, graph, x = branches(1.0)
    assert not gains(model, graph, x * float("nan")).isfinite().all()
