"""A network from its name, with its weights."""

import difflib
import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torchvision.models
from torch import nn

from diffprune import digits
from diffprune.errors import BadModel, BadWeights, first_line
from diffprune.importing import called, imported
from diffprune.weights import AUXILIARY, FILES, fill_, named_weights

DIGITS = {"resnet18": digits.resnet18}

_UNTOUCHED = "no network was built"


def load_model(spec: str, *, weights: str | None = None, num_classes: int | None = None) -> nn.Module:
    """The network that `spec` names, on the CPU.

    `torchvision:NAME` is one of torchvision's classification networks, `digits:resnet18` the demo's network, and
    `package.module:factory` what the user's own `factory()` returns. The last imports and runs the user's code, which
    is also looked for in the current folder; `num_classes` goes to a factory that has a parameter of that name.

    Weights are a `.safetensors` file, a `.pt` or `.pth` file with nothing in it but tensors, for torchvision also the
    name of its pretrained weights such as `DEFAULT`, or None for fresh ones. A pretrained classifier of another size
    than `num_classes` gives way to a fresh layer, drawn from torch's global generator.

    Raises:
        BadModel: `spec` does not lead to a network.
        BadWeights: the weights are unknown, out of reach, damaged, hold more than tensors, or do not fit the network.
    """
    source, _, name = spec.partition(":")
    if not source or not name:
        raise BadModel(
            f"{spec!r} does not name a network",
            at="model",
            effect=_UNTOUCHED,
            fix="write torchvision:NAME, digits:resnet18 or package.module:factory",
        )
    named = named_weights(weights)
    if named and source != "torchvision":
        raise BadWeights(
            f"{weights!r} is not a weights file",
            at=f"weights of {spec}",
            effect=_UNTOUCHED,
            fix=f"give a {', '.join(FILES)} file, or none; named weights belong to torchvision networks",
        )
    if source == "torchvision":
        model = _from_torchvision(name, named, num_classes)
    elif source == "digits":
        _require_known(name, DIGITS, spec)
        model = DIGITS[name](**_classes(num_classes))
    else:
        model = _from_user(spec, num_classes)
    if weights is not None and not named:
        fill_(model, Path(weights), spec)
    return model


def _from_user(spec: str, num_classes: int | None) -> nn.Module:
    factory = imported(spec, BadModel)
    try:
        takes_classes = "num_classes" in inspect.signature(factory).parameters
    except ValueError:  # some builtins have no signature
        takes_classes = False
    model = called(spec, factory, BadModel, **_classes(num_classes if takes_classes else None))
    if not isinstance(model, nn.Module):
        raise BadModel(
            f"the factory returned {type(model).__name__}, not a torch.nn.Module",
            at=spec,
            effect=_UNTOUCHED,
            fix="return the network itself",
        )
    return model


def _from_torchvision(name: str, weights: str | None, num_classes: int | None) -> nn.Module:
    names = torchvision.models.list_models(module=torchvision.models)
    _require_known(name, names, f"torchvision:{name}")
    if weights is None:
        quiet = {"init_weights": True} if name in AUXILIARY else {}  # else torchvision warns that this will change
        model: nn.Module = torchvision.models.get_model(name, weights=None, **_classes(num_classes), **quiet)
    else:
        model = _pretrained(name, weights)
        if num_classes is not None:
            _resize_head_(model, num_classes)
    if name in AUXILIARY:
        _drop_heads_(model, AUXILIARY[name])
    return model


def _drop_heads_(model: Any, heads: tuple[str, ...]) -> None:
    for head in heads:
        setattr(model, head, None)
    model.aux_logits = False


def _pretrained(name: str, weights: str) -> nn.Module:
    offered = torchvision.models.get_model_weights(name)
    at, known = f"weights of torchvision:{name}", [*offered.__members__]
    if weights != "DEFAULT" and weights not in known:
        raise BadWeights(
            f"there are no weights {weights!r}",
            at=at,
            effect=_UNTOUCHED,
            fix=f"one of {', '.join(['DEFAULT', *known])}, or a {', '.join(FILES)} file",
        )
    member = offered.DEFAULT if weights == "DEFAULT" else offered[weights]
    try:
        # torchvision reads its cached file without weights_only: let it, once this has found nothing but tensors there.
        member.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
        model: nn.Module = torchvision.models.get_model(name, weights=member, progress=False)
    except Exception as cause:
        raise BadWeights(
            f"{member} could not be downloaded or read: {first_line(cause)}",
            at=at,
            effect=_UNTOUCHED,
            fix=f"go online once, or download {member.url} elsewhere and give that file as the weights",
        ) from cause
    return model


def _require_known(name: str, names: Collection[str], spec: str) -> None:
    if name in names:
        return
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    raise BadModel(
        f"there is no network {name!r}",
        at=spec,
        effect=_UNTOUCHED,
        fix=f"the nearest name is {nearest[0]}" if nearest else f"one of {', '.join(names)}",
    )


def _classes(num_classes: int | None) -> dict[str, int]:
    return {} if num_classes is None else {"num_classes": num_classes}


def _resize_head_(model: nn.Module, num_classes: int) -> None:
    """Give the classifier `num_classes` outputs: the last Linear in module order, without one the last Conv2d."""
    layers: list[tuple[str, Any]] = [*model.named_modules()]
    linear = [pair for pair in layers if isinstance(pair[1], nn.Linear)]
    name, old = (linear or [pair for pair in layers if isinstance(pair[1], nn.Conv2d)])[-1]
    if old.weight.shape[0] == num_classes:
        return
    bias = old.bias is not None
    if linear:
        model.set_submodule(name, nn.Linear(old.in_features, num_classes, bias=bias))
    else:
        model.set_submodule(name, nn.Conv2d(old.in_channels, num_classes, old.kernel_size, bias=bias))
