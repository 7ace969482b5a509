"""The networks of a finished run, read back from its folder."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from diffprune.config import Config
from diffprune.manifest import read_manifest
from diffprune.pruned import Origin, built, reloaded
from diffprune.weights import fill_

TRAINED = "dense.safetensors"
"""The weights of the dense network, if the run trained it."""


@dataclass(frozen=True, eq=False)
class Stored:
    """Both networks, and `example`, a random image (1, channels, height, width) of the size they take.

    `dense` has the weights that the run trained, if it did; else those of a file are not looked for, for it may lie
    elsewhere now, and of the dense network only its shapes and its speed are right.
    """

    dense: nn.Module
    pruned: nn.Module
    example: Tensor


def load_run(folder: Path) -> Stored:
    """The networks of a run. A factory of the user's own is run again.

    Raises:
        BadRun: no such run, or its manifest is damaged.
        BadModel, BadWeights, BadFile: its settings do not lead to the network, or a file of it is missing or damaged.
    """
    manifest = read_manifest(folder)
    config, origin = manifest.config, manifest.origin
    return Stored(dense_of(folder, config, origin), reloaded(folder, config, origin), origin.example[:1])


def dense_of(folder: Path, config: Config, origin: Origin) -> nn.Module:
    """The dense network, with the weights that the run trained, if it did. Raises BadModel and BadWeights."""
    dense, trained = built(config, origin), folder / TRAINED
    if trained.is_file():
        fill_(dense, trained, config.model)
    return dense
