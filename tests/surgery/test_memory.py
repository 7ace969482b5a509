"""Networks that remember something between two forwards: tracing leaves nothing in them, and no stand-in gets out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Cached(nn.Module):
    """A position bias that is computed once in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.rand(64, 2))
        self.cache: Tensor | None = None
        self.many: dict[str, Tensor] = {}
        self.mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 8, bias=False))
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def position(self) -> Tensor:
        if self.cache is None:
            self.cache = self.mlp(self.grid).T.view(8, 8, 8)
        if "half" not in self.many:
            self.many["half"] = self.cache / 2
        return self.cache + self.many["half"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.position()
        return self.head((x + self.b(self.a(x).relu())).mean((2, 3)))


def block(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU())


class Assigned(nn.Module):
    """Running statistics that are assigned, not written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3), keepdim=True).detach()
        return x - self.mean


class Codebook(nn.Module):
    """A frozen parameter that training moves (VQ-VAE)."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(16, 8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        index = torch.cdist(tokens.reshape(1, -1, 8), self.code[None])[0].argmin(1)
        found = F.embedding(index, self.code).view(tokens.shape)
        if self.training:
            self.code.data.mul_(0.9).add_(0.1 * (F.one_hot(index, 16).to(x).T @ tokens.reshape(-1, 8)))
        return (tokens + (found - tokens).detach()).permute(0, 3, 1, 2)


class Auxiliary(nn.Module):
    """A head that runs in training only, for which tracing runs the network in training mode too."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem, self.middle, self.b = block(3, 8), middle, block(8, 8)
        self.head, self.aux = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.middle(self.stem(x))
        y = self.head(self.b(x).mean((2, 3)))
        return (y, self.aux(x.mean((2, 3)))) if self.training else y


class Clamped(nn.Module):
    """A weight that the forward itself keeps small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.weight.clamp_(-0.1, 0.1)
        return self.head(self.stem(x).relu().mean((2, 3)))


class Biases(nn.Module):
    """LeViT's attention: `train` drops or makes the biases that eval mode adds."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.proj = nn.Linear(12, 48), nn.Linear(16, 12)
        self.biases = nn.Parameter(torch.randn(4, 16))
        self.register_buffer("index", torch.randint(0, 16, (16, 16)), persistent=False)

    @torch.no_grad()
    def train(self, mode: bool = True) -> "Biases":
        super().train(mode)
        if mode and hasattr(self, "ready"):
            del self.ready
        elif not mode:
            self.ready = self.biases[:, self.index]
        return self

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (z.transpose(1, 2) for z in self.qkv(x).view(n, t, self.heads, -1).split([4] * 3, -1))
        bias = self.biases[:, self.index] if self.training else self.ready
        return self.proj(((q @ k.transpose(-2, -1) / 2 + bias).softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1))


class Levit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention, self.head = nn.Conv2d(3, 12, 2, 2), Biases(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x)).mean(1))


class Recurrent(nn.Module):
    """State that is kept between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.u, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Linear(8, 5)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        before = torch.zeros_like(x) if self.state is None else self.state
        self.state = self.u(torch.cat([x, before], 1)).tanh()
        return self.head(self.state.mean((2, 3)))


NETWORKS = {
    "cached": Cached,
    "assigned": lambda: Auxiliary(Assigned()),
    "codebook": lambda: Auxiliary(Codebook()),
    "clamped": Clamped,
    "levit": Levit,
    "recurrent": Recurrent,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_tracing_leaves_nothing_behind_and_the_cut_runs_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    untouched = copy.deepcopy(model)
    try:
        graph = surgery.trace(model, X)
    except surgery.SurgeryError:
        assert name == "codebook"
        graph = None
    for key, value in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model)(X), copy.deepcopy(untouched)(X))
        if graph is None:
            return
        torch.testing.assert_close(surgery.cut(model, graph, {})(X), copy.deepcopy(untouched)(X))
        keep = {group.name: torch.arange(group.units) >= group.units // 2 for group in graph.groups}
        small, masked = surgery.cut(model, graph, keep), surgery.mask(model, graph, keep)
        torch.testing.assert_close(small(X), masked(X), rtol=1e-4, atol=1e-5)
        assert model(X).shape == (2, 5)


@pytest.mark.parametrize("bound", ["clamp", "hardtanh", "threshold"])
def test_a_bound_that_is_a_width_is_found_though_the_example_never_meets_it(bound: str) -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            width = float(x.shape[1])
            x = {
                "clamp": lambda: x.clamp(-width, width),
                "hardtanh": lambda: F.hardtanh(x, -width, width),
                "threshold": lambda: F.threshold(x, -width, 0.0),
            }[bound]()
            return self.head(self.b(x).mean((2, 3)))

    torch.manual_seed(0)
    graph = surgery.trace(Bounded().eval(), X)
    assert [group.name for group in graph.groups] == ["b"]
    assert any(f"{bound} at" in pin.reason for pin in graph.pinned)


def parts(x: Tensor, groups: int, channels: int) -> Tensor:
    """A helper that several layers share, as einops.rearrange is one."""
    return x.view(x.shape[0], groups, channels, *x.shape[2:])


def test_a_helper_that_one_caller_gives_a_number_blames_that_caller_only() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.groups = 4
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 6, 1)
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = parts(x, self.groups, x.shape[1] // self.groups).flatten(1, 2).relu()
            x = parts(self.b(x), 3, 4).flatten(1, 2).relu()
            return self.head(self.c(x).mean((2, 3)))

    torch.manual_seed(0)
    graph = surgery.trace(Calls().eval(), X)
    assert {"a", "c"} <= {group.name for group in graph.groups}
    assert "b" not in graph.by_name
    assert [pin.reason for pin in graph.pinned if pin.where == "b"]


def test_parts_of_unequal_size_are_no_pair_where_a_cut_makes_them_equal() -> None:
    """Partial convolution (FasterNet)."""

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = [4, 12]
            self.stem, self.part = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.up, self.down, self.head = nn.Conv2d(16, 20, 1), nn.Conv2d(20, 16, 1), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            first, rest = torch.split(x, self.sizes, 1)
            return self.head((x + self.down(self.up(torch.cat([self.part(first), rest], 1)).relu())).mean((2, 3)))

    torch.manual_seed(0)
    graph = surgery.trace(Partial().eval(), X)
    assert sum(group.units for group in graph.groups) == 40
    assert {pin.where for pin in graph.pinned} == {"x", "head"}
