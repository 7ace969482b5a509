"""A newcomer's folder and keyboard: tiny networks and data, and `diffprune` as it is typed there."""

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffprune import cli, shipping

MODULE = "newcomers_nets"
NETWORKS = """
import random

import torch
from torch import nn


def head(width, num_classes):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)


def factory(num_classes=10, channels=1):
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), *head(16, num_classes),
    )


def colour(num_classes=10):
    return factory(num_classes, channels=3)


def many():
    return factory(num_classes=12)


def few():
    return factory(num_classes=2)


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.factor = random.uniform(1, 2)

    def forward(self, x):
        return self.factor * self.inner(x)


def drawn(num_classes=10):
    return Scaled(colour(num_classes))


class Restless(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.factor = random.uniform(1, 2)

    def forward(self, x):
        return self.factor * super().forward(x)


def restless(num_classes=10):
    return Restless(*factory(num_classes))


def last(num_classes=10):
    return colour(num_classes).to(memory_format=torch.channels_last)


def rigid(num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


class Deciding(nn.Module):  # goes one way or the other by what it computed, which ONNX files cannot
    def __init__(self, num_classes):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 8, 3), nn.Sequential(*head(8, num_classes))

    def forward(self, x):
        x = self.body(x).relu()
        return self.head(x * 0.5 if x.mean() > 1e9 else x)


def deciding(num_classes=10):
    return Deciding(num_classes)


def broken():
    raise RuntimeError("it is broken\\nin two lines")


def number():
    return 3
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def typed(*words: object) -> Outcome:
    """`diffprune WORDS`, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["diffprune", *map(str, words)])
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[Path]:
    """In `folder`, with NETWORKS and data beside, latency measured only briefly; everything as before afterwards."""
    furnish(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(shipping, "MEASURE_SECONDS", 0.2)
        patch.setenv("COLUMNS", "80")
        yield folder
    sys.modules.pop(MODULE, None)


def furnish(folder: Path) -> None:
    (folder / f"{MODULE}.py").write_text(NETWORKS)
    draw = np.random.default_rng(0)
    sides = {"train": 16, "val": 8}
    images = {f"{side}_images": draw.integers(0, 255, (n, 8, 8, 3), dtype=np.uint8) for side, n in sides.items()}
    labels = {f"{side}_labels": draw.integers(0, 3, n) for side, n in sides.items()}
    np.savez(folder / "colour.npz", **images, **labels)
    for side in sides:
        for label in ("cat", "dog"):
            (folder / "pictures" / side / label).mkdir(parents=True)
            for number in range(3):
                pixels = draw.integers(0, 255, (9, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "pictures" / side / label / f"{number}.png")
