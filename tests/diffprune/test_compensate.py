"""Layers fitted after a cut: the closed form, what it is for, and what it leaves alone."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import ZOO, randomised

import surgery
from diffprune.compensate import RIDGE, compensate_
from diffprune.errors import BadData
from diffprune.gains import gains
from diffprune.hints import hinting
from diffprune.readings import PLACES, rows_given, rows_read
from diffprune.recover import recalibrate_
from surgery import check_equal

GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(0, 1)),
        nn.Conv2d(3, 4, 1, stride=2), nn.Linear(3, 4),
    ],
)
@pytest.mark.parametrize("side", [5, 13])
def test_what_is_read_gives_what_is_given(layer: nn.Module, side: int) -> None:
    x = torch.randn(3, 3, side, side, generator=GENERATOR)
    x = x if isinstance(layer, nn.Conv2d) else x.permute(0, 2, 3, 1)
    with torch.no_grad():
        y = layer(x)
        read, given = rows_read("name", layer, x), rows_given("name", layer, y)
        places = y.numel() // 4 if y.numel() // 4 <= 3 * PLACES or isinstance(layer, nn.Conv2d) else 3 * PLACES
        assert len(read) == len(given) == min(places, 3 * min(PLACES, y.numel() // 12))
        assert torch.allclose(F.linear(read, layer.weight.flatten(1), layer.bias), given, atol=1e-5)


def chain() -> tuple[nn.Module, Tensor]:
    """A width in which every channel is a mixture of a few: most of it can go without loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1)).double()
    return model.eval(), torch.randn(64, 3, 6, 6, dtype=torch.float64)


def error(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - small(x)).square().mean() / model(x).var())


def test_what_the_rest_can_make_up_for_is_made_up_for() -> None:
    model, x = chain()
    graph = surgery.trace(model, x)
    keep = {"0": torch.arange(8) < 4}  # 3 channels and a bias span all eight
    small = surgery.cut(model, graph, keep)
    before = error(model, small, x)
    compensate_(small, model, graph, keep, x)
    assert error(model, small, x) < before / 20


def test_values_that_cannot_be_squared_are_refused() -> None:
    model, x = chain()
    model, x = model.float(), x.float()
    graph = surgery.trace(model, x)
    keep = {"0": torch.arange(8) < 4}
    with pytest.raises(BadData, match=r"not finite, or too large to be squared(.|\n)*fitting 0 after the cut"):
        compensate_(surgery.cut(model, graph, keep), model, graph, keep, 1e20 * x)


def test_the_fit_is_the_closed_form_of_ridge_regression() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double().eval(), torch.randn(30, 4, dtype=torch.float64)
    graph = surgery.trace(model, x)
    keep = {"0": torch.tensor([True, False, True, True, False, True])}
    small = surgery.cut(model, graph, keep)
    old = small[1].weight.detach().clone()
    with torch.no_grad():
        read, wanted = small[0](x), model(x)
    compensate_(small, model, graph, keep, x)
    centred, target = read - read.mean(0), wanted - wanted.mean(0)
    gram = centred.T @ centred
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.solve(gram + ridge, centred.T @ target + ridge @ old.T).T
    assert torch.allclose(small[1].weight, expected, atol=1e-10)
    with torch.no_grad():
        assert torch.allclose(small(x).mean(0), wanted.mean(0))


def test_with_fewer_places_than_inputs_the_same_is_solved() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 3)).double().eval()
    few, many = torch.randn(10, 4, dtype=torch.float64), None
    graph = surgery.trace(model, few)
    keep = {"0": torch.arange(40) < 30}
    small = surgery.cut(model, graph, keep)
    many = copy.deepcopy(small)
    compensate_(small, model, graph, keep, few)
    compensate_(many, model, graph, keep, few.repeat(5, 1))  # the same problem, with more rows than inputs
    assert torch.allclose(small[1].weight, many[1].weight, atol=1e-8)


def test_a_network_that_lost_nothing_stays_what_it_is() -> None:
    model, x = chain()
    graph = surgery.trace(model, x)
    small = surgery.cut(model, graph, {})
    compensate_(small, model, graph, {}, x)
    assert check_equal(model, small, x) < 1e-9


def test_frozen_layers_shared_ones_and_modes_stay() -> None:
    model = randomised(ZOO["shared_module"].build()).double()
    x = ZOO["shared_module"].example(batch=16)
    graph = surgery.trace(model, x)
    keep = {group.name: torch.arange(group.units) < group.units // 2 for group in graph.groups}
    small = surgery.cut(model, graph, keep).train()
    small.head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    compensate_(small, model, graph, keep, x)
    changed = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    assert small.training
    assert not changed & {"head.weight", "a.weight"}
    assert changed


def rectified(bias: bool, norm: bool) -> nn.Module:
    """The second layer reads values with a mean, and has a bias or a norm that takes it, or neither."""
    after = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=bias), *after).double()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("bias", "norm"), [(False, False), (True, False), (False, True)])
def test_no_mean_is_lost_where_nothing_else_takes_it(bias: bool, norm: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = rectified(bias, norm), torch.randn(400, 6, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(200):
            model(x)  # running statistics
    graph = surgery.trace(model.eval(), x)
    keep = {graph.groups[0].name: torch.arange(32) < 8}
    small = surgery.cut(model, graph, keep)
    before = error(model, small, x)
    compensate_(small, model, graph, keep, x)
    assert error(model, small, x) < before / 2
    with torch.no_grad():
        off = (small(x).mean(0) - model(x).mean(0)).norm() / model(x).std(0).norm()
    assert off < (1e-5 if bias or norm else 0.2)


def test_a_frozen_bias_stays_and_the_weight_makes_up_for_it() -> None:
    torch.manual_seed(0)
    model, x = rectified(bias=True, norm=False).eval(), torch.rand(400, 6, dtype=torch.float64)
    model[2].bias.requires_grad_(False)
    graph = surgery.trace(model, x)
    keep = {"0": torch.arange(32) < 12}
    small = surgery.cut(model, graph, keep)
    before = error(model, small, x)
    compensate_(small, model, graph, keep, x)
    assert torch.equal(small[2].bias, model[2].bias)
    assert error(model, small, x) < before / 10


class Stream(nn.Module):
    """Two branches on a stream: what the first loses the second can give, for it reads all of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1, bias=False)
        self.c, self.d = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.norm_b, self.norm_d = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = x + self.norm_b(self.b(self.a(x)))
        return y + self.norm_d(self.d(self.c(x)))


def stream() -> tuple[nn.Module, surgery.ChannelGraph, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model, x = Stream().double(), torch.randn(64, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        model(x)  # running statistics of these images, in part
        model.norm_d.weight.copy_(torch.tensor([1.0, 0.5, 2.0, 1.0]))
    model.eval()
    graph = surgery.trace(model, x)
    return model, graph, {"a": torch.arange(16) < 2}, x


def test_a_layer_makes_up_for_what_the_stream_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, keep, x = stream()
    small = surgery.cut(model, graph, keep)
    compensate_(small, model, graph, keep, x)
    monkeypatch.setattr("diffprune.compensate.same_operators", lambda *_: False)
    plain = surgery.cut(model, graph, keep)
    compensate_(plain, model, graph, keep, x)
    assert error(model, small, x) < 1e-3 < 0.05 < error(model, plain, x)


class Fork(nn.Module):
    """Two branches that are added to the same tensor, the second given by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)
        self.b, self.c, self.d = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * 1.0
        y = self.a(x).relu()
        return torch.cat((x + self.b(y), x + self.c(y), self.d(input=x)), 1)


def test_one_tensor_may_be_in_several_sums() -> None:
    torch.manual_seed(0)
    model, x = Fork().double().eval(), torch.randn(32, 3, 5, 5, dtype=torch.float64)
    graph = surgery.trace(model, x)
    keep = {"a": torch.arange(8) < 4}
    small = surgery.cut(model, graph, keep)
    before = error(model, small, x)
    compensate_(small, model, graph, keep, x)
    assert error(model, small, x) < before / 2


def test_layers_may_be_called_by_keyword() -> None:
    torch.manual_seed(0)
    model, x = Fork().double().eval(), torch.randn(8, 3, 5, 5, dtype=torch.float64)
    graph = surgery.trace(model, x)
    assert gains(model, graph, x).isfinite().all()
    keep = {"a": torch.arange(8) < 4}
    small = surgery.cut(model, graph, keep)
    with hinting(small, model, ["a.weight", "d.weight"], graph.checked(keep)[1]) as hint:
        model(x), small(x)
        assert hint() == 0


def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprune.compensate._as_long_as_", lambda layer, old: torch.ones(len(old)))


def test_batch_norm_maps_a_fitted_layer_as_before_though_its_variance_fell(monkeypatch: pytest.MonkeyPatch) -> None:
    any_length(monkeypatch)
    model, graph, keep, x = stream()
    small = surgery.cut(model, graph, keep)
    slope = small.norm_b.weight / (small.norm_b.running_var + small.norm_b.eps).sqrt()
    compensate_(small, model, graph, keep, x)
    assert (small.norm_b.running_var < 0.9 * model.norm_b.running_var).any()
    assert torch.allclose(small.norm_b.weight / (small.norm_b.running_var + small.norm_b.eps).sqrt(), slope)


def test_weights_before_batch_norm_stay_as_long_as_they_were_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, graph, keep, x = stream()
    model.norm_b.eps = 0.1
    cut, small = surgery.cut(model, graph, keep), surgery.cut(model, graph, keep)
    compensate_(small, model, graph, keep, x)
    any_length(monkeypatch)
    longer = surgery.cut(model, graph, keep)
    compensate_(longer, model, graph, keep, x)

    def lengths(net: Any) -> Tensor:
        return torch.cat([layer.weight.flatten(1).norm(dim=1) for layer in (net.b, net.d)])

    torch.testing.assert_close(lengths(small), lengths(cut))
    assert (lengths(longer) / lengths(cut) > 1.2).any()
    torch.testing.assert_close(small(x), longer(x))


class Leak(Stream):
    """What `b` gives is read by its BatchNorm and by what the network returns."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x * 1.0))
        return self.norm_b(y) + 1.0 * y


def test_a_weight_that_others_read_as_well_keeps_its_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprune.compensate.RIDGE", 1e-9)
    torch.manual_seed(0)
    model, x = Leak().double(), torch.randn(64, 4, 6, 6, dtype=torch.float64)
    model.norm_b.momentum = 1.0
    with torch.no_grad():
        model(x)
    graph = surgery.trace(model.eval(), x)
    keep = {"a": torch.arange(16) < 6}  # more than the 4 that `a` reads, so that nothing need be lost
    small = surgery.cut(model, graph, keep)
    compensate_(small, model, graph, keep, x)
    assert error(model, small, x) < 1e-5


def test_an_output_that_the_fit_silences_is_not_blown_up() -> None:
    model, graph, keep, x = stream()
    with torch.no_grad():
        model.b.weight[0, :2] *= 1e-20  # all that is left of it
    small = surgery.cut(model, graph, keep)
    compensate_(small, model, graph, keep, x)
    assert all(value.isfinite().all() for value in small.state_dict().values())
    assert small.norm_b.weight[0].abs() < 10


class Shared(Stream):
    """One BatchNorm behind two layers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x * 1.0)
        return self.norm_b(self.b(y)) + x + self.norm_b(self.c(x))


class Tokens(nn.Module):
    """A linear layer whose tokens, not outputs, a BatchNorm normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.c = nn.Linear(6, 16), nn.Linear(16, 12), nn.BatchNorm1d(7), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(self.a(x).relu()))).mean(1)


class Untracked(Stream):
    """The BatchNorm before the sum has no running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_b = nn.BatchNorm2d(4, track_running_stats=False)


@pytest.mark.parametrize("make", [Shared, Tokens, Untracked, Leak])
def test_where_batch_norm_is_not_the_layers_own_the_fit_helps_all_the_same(make: Any) -> None:
    torch.manual_seed(1)
    model, x = make().double(), torch.randn((64, 7, 6) if make is Tokens else (64, 4, 6, 6), dtype=torch.float64)
    for norm in (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
        norm.momentum = None
    with torch.no_grad():
        model(x)
    graph = surgery.trace(model.eval(), x)
    keep = {"a": torch.arange(16) < 3}
    small = surgery.cut(model, graph, keep)
    recalibrate_(small, [x])
    before = error(model, small, x)
    compensate_(small, model, graph, keep, x)
    recalibrate_(small, [x])
    assert error(model, small, x) < 0.95 * before


def test_a_faint_or_frozen_norm_asks_for_nothing_unreasonable() -> None:
    model, graph, keep, x = stream()
    with torch.no_grad():
        model.norm_d.weight[0] = 0.0
    small = surgery.cut(model, graph, keep)
    small.norm_b.weight.requires_grad_(False)
    before = small.norm_b.weight.clone()
    compensate_(small, model, graph, keep, x)
    assert torch.equal(small.norm_b.weight, before)
    assert all(value.isfinite().all() for value in small.state_dict().values())
    assert small.d.weight.abs().max() < 100
