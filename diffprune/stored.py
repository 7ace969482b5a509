"""The networks of a finished run, read back from its folder."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import surgery
from diffprune.config import load_config
from diffprune.models import load_model
from export.sessions import open_session


@dataclass(frozen=True, eq=False)
class Stored:
    """Both networks, and `example`, a random image (1, channels, height, width) of the size they take."""

    dense: nn.Module
    pruned: nn.Module
    example: Tensor


def load_run(folder: Path) -> Stored:
    """Dense and pruned network as the run left them. A factory of the user's own is run again.

    Raises:
        BadConfig, BadModel, BadWeights: its settings are missing or damaged, or do not lead to the dense network.
        BadOnnx, BadFile: dense.onnx or pruned.safetensors is missing, damaged, or of another network.
    """
    config = load_config(folder / "config.toml")
    session = open_session(folder / "dense.onnx")
    (_, *shape), (_, classes) = session.get_inputs()[0].shape, session.get_outputs()[0].shape
    trained = folder / "dense.safetensors"
    weights = str(trained) if trained.is_file() else config.weights
    dense = load_model(config.model, weights=weights, num_classes=classes)
    pruned = surgery.load(folder / "pruned.safetensors", lambda: copy.deepcopy(dense))
    return Stored(dense, pruned, torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)))
