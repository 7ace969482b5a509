"""The dense networks that the frontier starts from: their data, their weights, and the peers they are compared with."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.cifar_resnet import resnet18, resnet20, resnet56
from benchmarks.lenet5 import lenet5
from benchmarks.peers import PEERS
from diffprune.data import Data, load_data
from diffprune.feeding import endless
from diffprune.training import Recipe, fit_
from export import cache_folder

BEST_PEERS = ("taylor", "magnitude", "uniform")
"""The best two means of the grid of ResNet-20 with an epoch, and magnitude, which is near taylor at 2x."""
CIFAR, MNIST = "cifar10:{}/cifar10", "mnist:{}"


@dataclass(frozen=True)
class Parent:
    """`data` has {} for the folder with all data. `epochs` of training at the rate `lr` make one without `weights`.

    `hints` are those of the recipe, for all methods: 0 where peers cannot be given any, because no layer of a network
    cut by them reads all that it did.
    """

    title: str
    build: Callable[[], nn.Module]
    data: str = CIFAR
    weights: str | None = None
    epochs: int = 0
    lr: float = 0.1
    hints: float = Recipe.hints
    peers: Iterable[str] = BEST_PEERS

    def trained(self, folder: Path, device: str) -> nn.Module:
        """In eval mode, on the CPU. `device` is where it is trained, if it has to be."""
        model = self.build()
        file = folder / "weights" / self.weights if self.weights else None
        model.load_state_dict(load_file(file or trained_once(self, load_data(self.data.format(folder)), device)))
        return model.eval()


def trained_once(parent: Parent, data: Data, device: str) -> Path:
    """The file in `cache_folder()` with its weights, which are trained if there is none."""
    file = cache_folder() / f"{parent.title}-{parent.epochs}.safetensors"
    if not file.is_file():
        torch.manual_seed(0)
        recipe = Recipe(lr=parent.lr, distill=0.0, precision="bfloat16" if device == "cuda" else "float32")
        model, total = parent.build().to(device, memory_format=torch.channels_last), parent.epochs * len(data.train)
        fit_(model, endless(data.train), recipe, steps=range(total), total=total, phase="parent")
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".draft")
        save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, draft)
        draft.replace(file)
    return file


PARENTS = {
    "lenet5": Parent(
        "LeNet-5", lenet5, MNIST, epochs=10, lr=0.05, hints=0.0, peers=[name for name in PEERS if name != "bn-scale"]
    ),  # which has no BatchNorm
    "resnet18": Parent("ResNet-18", resnet18, epochs=30),
    "resnet20": Parent("ResNet-20", resnet20, weights="cifar10_resnet20.safetensors", peers=PEERS),
    "resnet56": Parent("ResNet-56", resnet56, weights="cifar10_resnet56.safetensors"),
}
