"""Tiny networks, named by what is special about exporting them. 3 channels in, 5 classes out, unless said otherwise."""

import torch
from torch import Tensor, nn


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and scales as after training: with those of a fresh BatchNorm a forgotten one would not be noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def plain(width: int = 8, seed: int = 0) -> nn.Module:
    """Conv, BatchNorm, ReLU, Conv, ReLU, pool, Linear."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 5),
        )
    return randomised(layers, seed)


class Gated(nn.Module):
    """Conv, then one factor per channel, then BatchNorm: what a gate looks like that was never folded or cut."""

    def __init__(self, gate: list[float], *, behind_activation: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, len(gate), 3, padding=1)
        self.norm = nn.BatchNorm2d(len(gate))
        self.register_buffer("gate", torch.tensor(gate))
        self.head = nn.Linear(len(gate), 5)
        self.behind_activation = behind_activation
        randomised(self)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate.view(1, -1, 1, 1)
        y = self.norm(self.conv(x)).relu() * gate if self.behind_activation else self.norm(self.conv(x) * gate).relu()
        return self.head(y.mean((2, 3)))


class SharedConv(nn.Module):
    """One Conv with two different BatchNorms, neither of which can be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        randomised(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.conv(x)).relu())).mean((2, 3))


class ReadTwice(nn.Module):
    """A Conv read by a BatchNorm, by a factor per channel and as it is: neither of the first two belongs into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("scale", torch.tensor([0.5, 2.0, -1.0]).view(1, 3, 1, 1))
        randomised(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (self.norm(y).relu() + (y * self.scale).relu() + y).mean((2, 3))


class TwoInputs(nn.Module):
    """Pixels and an index in, a dict with a nested tuple out. The index is valid from 0 to 6."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor, index: Tensor) -> dict[str, object]:
        y = self.linear(x)
        return {"logits": y + self.table(index), "features": (y.relu(), y.argmax(1))}


class FixedBatch(nn.Module):
    """The batch size written into the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(2, 6))
