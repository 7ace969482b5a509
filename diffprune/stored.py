"""The networks of a finished run, read back from its folder."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from diffprune.manifest import read_manifest
from diffprune.models import load_model
from diffprune.pruned import reloaded


@dataclass(frozen=True, eq=False)
class Stored:
    """Both networks, and `example`, a random image (1, channels, height, width) of the size they take."""

    dense: nn.Module
    pruned: nn.Module
    example: Tensor


def load_run(folder: Path) -> Stored:
    """Dense and pruned network as the run left them. A factory of the user's own is run again.

    Raises:
        BadRun: no such run, or its manifest is damaged.
        BadModel, BadWeights, BadFile: its settings do not lead to the network, or a file of it is missing or damaged.
    """
    manifest = read_manifest(folder)
    config, origin = manifest.config, manifest.origin
    trained = folder / "dense.safetensors"
    weights = str(trained) if trained.is_file() else config.weights
    dense = load_model(config.model, weights=weights, num_classes=origin.classes)
    return Stored(dense, reloaded(folder, config, origin), origin.example[:1])
