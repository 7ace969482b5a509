"""The ONNX files of a pruned network, and the promise that they can be written again."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import export
import surgery
from diffprune.config import Config, last_of
from diffprune.errors import NotReproducible
from diffprune.models import load_model
from diffprune.weights import named_weights
from export.drafts import sha256_of

SAVED = "pruned.safetensors"
STATIC = "-static"


@dataclass(frozen=True)
class Origin:
    """What the files come from, beside the settings and the saved network.

    `classes` is what the factory of the dense network is given, `metadata` what every file says of itself, among it
    the JSON of `input_shape` (C, H, W) and, where they are known, of `mean` and `std`.
    """

    classes: int | None
    labels: Sequence[str] | None
    metadata: Mapping[str, str]

    @property
    def example(self) -> Tensor:
        """Two images of noise: the bytes of a file do not depend on what is in them."""
        shape = json.loads(self.metadata["input_shape"])
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    @property
    def preprocessing(self) -> export.Preprocessing:
        return export.Preprocessing(*(json.loads(self.metadata[key]) for key in ("mean", "std")))

    @property
    def normalised(self) -> bool:
        """Whether it is known how pixels became what the network takes."""
        return "mean" in self.metadata and normalised(self.preprocessing.mean, self.preprocessing.std)


def about(model: str, weights: str | None, license: str, shape: tuple[int, ...]) -> dict[str, str]:
    """What every file says of itself, of an absolute path of weights the last name only."""
    named = {"base_weights": last_of(weights)} if weights else {}
    return {"source_model": model, "base_model": model, **named, "license": license, "input_shape": json.dumps(shape)}


def normalised(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether the data says how pixels became what the network takes: with 0 and 1 it was given as it is."""
    return any(mean) or set(std) != {1}


def baked(config: Config, origin: Origin) -> dict[str, export.Preprocessing | None]:
    """The files that the settings ask for, by name, and what is baked into each; twins lie beside them."""
    return {"pruned.onnx": None, **({"pruned-uint8.onnx": origin.preprocessing} if config.preprocessing else {})}


def twin_of(path: Path) -> Path:
    return path.with_stem(path.stem + STATIC)


def write_files(
    folder: Path,
    network: nn.Module,
    wanted: Mapping[str, export.Preprocessing | None],
    origin: Origin,
    *,
    twins: bool,
    opset: int = 18,
) -> dict[str, export.OnnxFile]:
    """A file for each name `wanted`, with what is baked into it, and with `twins` one of a fixed batch of 1 beside it.

    By stem. Each has computed what the network computes.
    """
    files = {}
    for name, inside in wanted.items():
        path = folder / name
        files[path.stem] = export.to_onnx(
            network, origin.example, path, metadata=origin.metadata, labels=origin.labels, opset=opset,
            preprocessing=inside,
        )  # fmt: skip
        if twins:
            other = twin_of(path)
            files[other.stem] = export.static_twin(path, other, network, origin.example, preprocessing=inside)
    return files


def write_pruned(folder: Path, network: nn.Module, config: Config, origin: Origin) -> dict[str, export.OnnxFile]:
    """The pruned network as the settings ask for it."""
    return write_files(folder, network, baked(config, origin), origin, twins=config.static_twin)


def reloaded(folder: Path, config: Config, origin: Origin) -> nn.Module:
    """The saved network of a run. Imports and runs the user's factory, if that is what the settings name."""
    return surgery.load(folder / SAVED, lambda: built(config, origin)).eval()


def built(config: Config, origin: Origin) -> nn.Module:
    """The dense network of a run, but for weights that a file has.

    Named weights are loaded even if they are replaced then: some networks of torchvision compute something else with
    them.
    """
    return load_model(config.model, weights=named_weights(config.weights), num_classes=origin.classes)


def require_reproducible(
    network: nn.Module, config: Config, origin: Origin, hashes: Mapping[str, str], *, known: str = ""
) -> int:
    """Write the files of `network` again; how many are the same. `hashes`: the sha256 of each file, by its name.

    Raises:
        NotReproducible: a file has other bytes. `known` is what may explain that.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_pruned(Path(folder), network, config, origin)
        again = {path.name: sha256_of(path) for path in sorted(Path(folder).iterdir())}
    require_same_bytes(again, hashes, source=SAVED, known=known)
    return len(again)


def require_same_bytes(again: Mapping[str, str], before: Mapping[str, str], *, source: str, known: str = "") -> None:
    """Both are the sha256 of files by name. Raises NotReproducible."""
    if other := [name for name, digest in again.items() if before.get(name) != digest]:
        raise NotReproducible(
            f"{len(other)} of {len(again)} files come out with other bytes when they are written again",
            at=", ".join(f"{name}: sha256 {again[name][:12]}, was {before.get(name, 'absent')[:12]}" for name in other),
            effect=f"nobody can tell that these files come from {source}",
            fix=known or "give a factory and a forward that do the same in every run; look for randomness in them",
        )
