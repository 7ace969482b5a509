"""Weights from a file into a network, if they fit it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffprune.errors import BadWeights, first_line

FILES = (".safetensors", ".pt", ".pth")

# Heads that only training reads; they would turn the output into a tuple. torchvision drops GoogLeNet's as well.
AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}


def named_weights(weights: str | None) -> str | None:
    """What are not the weights of a file but a name of torchvision's; none for a file."""
    return None if weights is None or Path(weights).suffix.lower() in FILES else weights


def fill_(model: nn.Module, file: Path, spec: str) -> None:
    """Put the weights of a file into the network that `spec` names, all of them but those of AUXILIARY heads.

    Raises BadWeights.
    """
    ignored = AUXILIARY.get(spec.removeprefix("torchvision:"), ())
    state = {key: value for key, value in _read(file).items() if key.partition(".")[0] not in ignored}
    own = model.state_dict()
    wrong = [key for key, value in state.items() if key in own and value.shape != own[key].shape]
    result = model.load_state_dict({key: value for key, value in state.items() if key not in wrong}, strict=False)
    missing = [key for key in result.missing_keys if key not in wrong]
    shapes = [f"{key} is {tuple(state[key].shape)}, needs {tuple(own[key].shape)}" for key in wrong]
    found = {"missing": missing, "unexpected": result.unexpected_keys, "of the wrong shape": shapes}
    facts = [
        f"{len(keys)} {kind}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for kind, keys in found.items()
        if keys
    ]
    if facts:
        raise BadWeights(
            f"the weights do not fit the network: of {len(own)} tensors" + "".join(f"\n    {fact}" for fact in facts),
            at=f"{file} in {spec}",
            effect="the network is of no use as it is now; nothing was started",
            fix="give the weights of this very network, with as many classes as the data",
        )


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, by name."""
    state: Any
    try:
        if path.suffix.lower() == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as cause:
        reason = cause.strerror or first_line(cause)
        raise _unread(path, f"the file cannot be read: {reason}", "give a readable weights file") from cause
    except Exception as cause:  # a damaged pickle raises almost anything
        foreign = re.search(r"Unsupported (?:global|class|operand).*?GLOBAL (\S+)", str(cause), re.DOTALL)
        if foreign is None:
            fact = f"the file is damaged or not a weights file: {first_line(cause)}"
            raise _unread(path, fact, "write or download it again") from cause
        fact = f"the file holds a pickled {foreign[1]}, and unpickling foreign objects can run any code"
        fix = "where it was made, save only the state dict: torch.save(model.state_dict(), path)"
        raise _unread(path, fact, fix) from cause
    if isinstance(state, Mapping):
        state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        fact = "the file holds no state dict: tensors by name, at the top or under state_dict or model"
        raise _unread(path, fact, "save the state dict: torch.save(model.state_dict(), path)")
    return dict(state)


def _unread(path: Path, fact: str, fix: str) -> BadWeights:
    return BadWeights(fact, at=str(path), effect="no weights were loaded", fix=fix)
