"""Networks written in ways that a trace could be misled by: exact, or pinned or refused with the reason."""

import types
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracle import gated_output, relative_error, run
from torch import Tensor, nn
from zoo import randomised

import surgery
from surgery.errors import BadFile, CaptureFailed

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def cbr(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU())


def ready(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomised(model).double().eval()


def random_keep(graph: surgery.ChannelGraph, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in graph.groups:
        keep[group.name] = torch.rand(group.units, generator=generator) < 0.6
        keep[group.name][int(torch.randint(group.units, (), generator=generator))] = True
    return keep


def prove(model: nn.Module, x: Any = X, seeds: int = 8) -> surgery.ChannelGraph:
    graph = surgery.trace(model, x)
    for seed in range(seeds):
        keep = random_keep(graph, seed)
        small = surgery.cut(model, graph, keep)
        assert relative_error(gated_output(model, graph, keep, x), run(small, x)) < 1e-12
        assert surgery.check_equal(surgery.mask(model, graph, keep), small, x) < 1e-12
    return graph


class ProjectIfWidthsDiffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 6), cbr(6, 8)
        self.project, self.free, self.fc = nn.Conv2d(6, 8, 1), cbr(8, 7), nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        if x.shape[1] != y.shape[1]:
            x = self.project(x)
        return self.fc(self.free(x + y))


class AddIfShapesAgree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = cbr(3, 6), cbr(6, 9), cbr(9, 5), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for block in (self.b, self.c):
            y = block(x)
            x = x + y if x.shape == y.shape else y
        return self.fc(x)


@pytest.mark.parametrize("build", [ProjectIfWidthsDiffer, AddIfShapesAgree])
def test_a_forward_that_asks_whether_widths_are_equal_keeps_them_apart(build: type[nn.Module]) -> None:
    graph = prove(ready(build()), seeds=40)
    assert any("widths are equal" in pinned.reason for pinned in graph.pinned)
    assert graph.groups, "what nobody asks about is free"


class Reduced(nn.Module):
    """Attention over fewer keys (PVT), with the reduction of the same value as the number of heads."""

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.sr_ratio, self.num_heads, self.head_dim = reduction, heads, dim // heads
        self.scale = self.head_dim**-0.5
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.sr, self.norm = nn.Conv2d(dim, dim, reduction, reduction), nn.LayerNorm(dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        n, tokens, _ = x.shape
        q = self.q(x).reshape(n, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        y = x
        if self.sr_ratio > 1:
            grid = x.transpose(1, 2).reshape(n, -1, height, width)
            y = self.norm(self.sr(grid).flatten(2).transpose(1, 2))
        k, v = self.kv(y).reshape(n, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, -1))


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Conv2d(3, 12, 2, 2), Reduced(12, 4, 4), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        tokens = x.flatten(2).transpose(1, 2)
        return self.head((tokens + self.attention(tokens, x.shape[2], x.shape[3])).mean(1))


def test_of_two_integers_of_one_value_only_the_right_one_follows_a_cut() -> None:
    model = ready(Pyramid())
    graph = prove(model)
    heads = graph.by_name["attention.q"]
    assert (heads.kind, heads.units) == ("head", 4)
    small = surgery.cut(model, graph, {heads.name: torch.arange(4) < 1})
    assert (small.attention.sr_ratio, small.attention.num_heads) == (4, 1)


@dataclass
class Answer:
    features: Tensor


class Named(OrderedDict[str, Tensor]):
    pass


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: types.SimpleNamespace(features=f), lambda f: Answer(f), lambda f: Named(features=f),
        lambda f: types.SimpleNamespace(inner=[Answer(f)]),
    ],
)
def test_outputs_in_containers_that_torch_does_not_know_keep_their_width(wrap: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = cbr(3, 6), cbr(6, 7), nn.Conv2d(7, 4, 1)

        def forward(self, x: Tensor) -> Any:
            features = self.a(x)
            return self.fc(self.b(features)), wrap(features)

    graph = surgery.trace(ready(Model()), X)
    assert [group.name for group in graph.groups] == ["b.0"]


class Scaled(nn.Module):
    """The lambda of a hook goes on reading the parameter of the network that it was made for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.temperature = cbr(3, 6), nn.Conv2d(6, 4, 1), nn.Parameter(torch.rand(1))
        self.fc.register_forward_hook(lambda module, inputs, output: output * self.temperature)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(x))


def test_a_lambda_that_holds_the_original_is_said() -> None:
    graph = surgery.trace(ready(Scaled()), X)
    assert not graph.groups
    assert any("which a lambda or a hook of it holds" in pinned.reason for pinned in graph.pinned)


class Grouped(nn.Module):
    def __init__(self, wide: int = 8, groups: int = 4) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 8), nn.Conv2d(8, wide, 3, padding=1, groups=groups)
        self.fc = nn.Conv2d(wide, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x)).relu())


@pytest.mark.parametrize(("wide", "groups"), [(8, 4), (16, 8), (16, 4)])
def test_grouped_convolutions_that_were_cut_twice_are_loaded_as_they_are(
    wide: int, groups: int, tmp_path: Path
) -> None:
    dense = ready(Grouped(wide, groups))
    small = dense
    for _ in range(3):
        graph = surgery.trace(small, X)
        keep = {group.name: torch.arange(group.units) < max(1, group.units // 2) for group in graph.groups}
        smaller = surgery.cut(small, graph, keep)
        assert surgery.check_equal(surgery.mask(small, graph, keep), smaller, X) < 1e-12
        surgery.save(smaller, tmp_path / "small.safetensors")
        loaded = surgery.load(tmp_path / "small.safetensors", lambda: Grouped(wide, groups).double()).eval()
        assert torch.equal(loaded(X), smaller(X))
        assert (loaded.b.groups, loaded.b.in_channels) == (smaller.b.groups, smaller.b.in_channels)
        small = smaller


class Settings(NamedTuple):
    width: int
    depth: int


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Settings(6, 2)
        self.a, self.b, self.fc = cbr(3, 6), cbr(6, 5), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc(self.b(x.view(len(x), self.config.width, -1).view_as(x)))


def test_a_named_tuple_may_remember_a_width() -> None:
    model = ready(Configured())
    graph = prove(model)
    assert set(graph.by_name) == {"a.0", "b.0"}
    assert surgery.cut(model, graph, {"a.0": torch.arange(6) < 4}).config == Settings(4, 2)


class Reordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = cbr(3, 6), cbr(3, 4), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1)
        self.register_buffer("order", torch.tensor([3, 0, 5, 1, 4, 2]))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.c(a[:, self.order]) + self.d(self.b(x).float().type_as(a))


def test_channels_in_the_order_of_a_buffer_and_in_the_dtype_of_others() -> None:
    model = ready(Reordered())
    graph = prove(model)
    assert {group.name: group.units for group in graph.groups} == {"a.0": 6, "b.0": 4}
    small = surgery.cut(model, graph, {"a.0": torch.tensor([True, False, True, True, False, True])})
    assert small.order.tolist() == [2, 0, 3, 1]


class Cropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.largest, self.a, self.fc = 6, cbr(3, 6), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x[..., : self.largest, : self.largest])
        batch, channels = x.shape[:2]
        return self.fc(x.view(batch, channels, -1).view_as(x))


def test_a_number_that_happens_to_be_as_large_as_a_width_stays() -> None:
    model = ready(Cropping())
    graph = surgery.trace(model, X[..., :2, :2])  # too small to tell the size from the width
    keep = {"a.0": torch.arange(6) < 4}
    small = surgery.cut(model, graph, keep)
    assert small.largest == 6
    surgery.check_equal(surgery.mask(model, graph, keep), small, X)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Grouped, "Grouped, a class, is not a network"),
        (3, "int is not a network"),
        (torch.jit.trace(ready(Grouped()), X), "compiled by TorchScript"),
        (nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(8, 4, 1)), "lazy layers that have not run yet"),
        (torch.compile(Grouped(), backend="eager"), "compiled by torch.compile"),
    ],
)
def test_what_is_no_plain_network_is_refused(model: Any, words: str) -> None:
    with pytest.raises(CaptureFailed, match=words):
        surgery.trace(model, X)


class Sharing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = cbr(3, 6), nn.Conv2d(6, 4, 1)
        values = torch.randn(4, dtype=torch.float64)
        self.register_buffer("u", values)
        self.register_buffer("v", values.view(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(x)) * self.v + self.u.sum()


def test_buffers_that_share_memory_are_saved(tmp_path: Path) -> None:
    model = ready(Sharing())
    graph = surgery.trace(model, X)
    small = surgery.cut(model, graph, random_keep(graph, 0))
    surgery.save(small, tmp_path / "small.safetensors")
    torch.testing.assert_close(surgery.load(tmp_path / "small.safetensors", lambda: ready(Sharing()))(X), small(X))


def test_values_that_a_file_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = ready(Grouped())
    model.register_buffer("phases", torch.zeros(3, dtype=torch.complex128))
    graph = surgery.trace(model, X)
    small = surgery.cut(model, graph, {})
    small.register_buffer("phases", torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(BadFile, match=r"holds no tensors of torch\.complex128"):
        surgery.save(small, tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = cbr(3, 6), cbr(6, 5), nn.Conv2d(5, 4, 1)
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 7.0))

    def forward(self, x: Tensor) -> Tensor:
        x -= self.mean
        return self.fc(self.b(self.a(x)))


def test_a_forward_that_writes_into_its_input_is_cut_and_the_example_stays() -> None:
    x = X.clone()
    model = ready(Centred())
    graph = surgery.trace(model, x)
    assert {group.name for group in graph.groups} == {"a.0", "b.0"}
    keep = random_keep(graph, 0)
    assert surgery.check_equal(surgery.mask(model, graph, keep), surgery.cut(model, graph, keep), x) < 1e-12
    assert torch.equal(x, X)


class Unwritable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = cbr(3, 6), nn.Conv2d(6, 4, 1)
        self.register_buffer("mean", torch.tensor(0.5, dtype=torch.float64).expand(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(x - self.mean))


def test_buffers_that_cannot_be_written_are_left_alone() -> None:
    torch.manual_seed(0)
    model = Unwritable().double().eval()
    assert [group.units for group in prove(model).groups] == [6]


class PaddedAtTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = cbr(3, 6), cbr(6, 9), nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc(F.pad(x, (0, 0, 0, 0, 0, 3)) + self.b(x))


def test_channels_may_be_padded_on_one_side() -> None:
    graph = prove(ready(PaddedAtTheEnd()))
    assert {group.name: group.units for group in graph.groups} == {"a.0": 6}


def test_another_default_device_is_refused() -> None:
    model, x = Grouped().eval(), torch.randn(2, 3, 8, 8)
    with torch.device("meta"), pytest.raises(surgery.CaptureFailed, match="torch makes new tensors on meta"):
        surgery.trace(model, x)
