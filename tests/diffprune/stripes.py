"""Pictures of stripes in three directions, small networks for them, and one for noise in colours."""

import torch
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy 8 x 8 pictures of stripes that lie, stand or lean, at random phases."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([y, x, (x + y) * 0.7])[labels] * 1.6
    phases = 6.3 * torch.rand(count, 1, 1, generator=generator)
    noise = 0.3 * torch.randn(count, 8, 8, generator=generator)
    return (torch.sin(waves + phases) + noise)[:, None], labels


def batched(count: int, seed: int) -> Batches:
    images, labels = stripes(count, seed)
    return [*zip(images.split(32), labels.split(32), strict=True)]


class Small(nn.Module):
    """A stem, a residual block with dropout behind it, and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.a, self.norm = nn.Conv2d(width, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.b, self.drop, self.head = nn.Conv2d(24, width, 1), nn.Dropout(0.1), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b(self.norm(self.a(x)).relu())
        return self.head(self.drop(x.relu().amax((2, 3))))


class Fixed(nn.Module):
    """Nothing between input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


PLAIN = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
SEEN = [(torch.randn(32, 3, 8, 8), torch.arange(32) % 4)]
