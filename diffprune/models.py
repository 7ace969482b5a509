"""A network from its name, with its weights."""

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torchvision.models
from safetensors.torch import load_file
from torch import Tensor, nn

from diffprune import digits
from diffprune.errors import BadModel, BadWeights, DiffpruneError

T = TypeVar("T")

DIGITS = {"resnet18": digits.resnet18}
FILES = (".safetensors", ".pt", ".pth")

# Heads that only training reads; they would turn the output into a tuple. torchvision drops GoogLeNet's as well.
AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}

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
    file = weights is not None and Path(weights).suffix.lower() in FILES
    if weights is not None and not file and source != "torchvision":
        raise BadWeights(
            f"{weights!r} is not a weights file",
            at=f"weights of {spec}",
            effect=_UNTOUCHED,
            fix=f"give a {', '.join(FILES)} file, or none; named weights belong to torchvision networks",
        )
    if source == "torchvision":
        model = _from_torchvision(name, None if file else weights, num_classes)
    elif source == "digits":
        model = _known(name, DIGITS, spec)(**_classes(num_classes))
    else:
        model = _from_user(spec, num_classes)
    if file:
        fill_(model, Path(str(weights)), spec)
    return model


def fill_(model: nn.Module, weights: Path, spec: str) -> None:
    """Put the weights of a file into the network that `spec` names. Raises BadWeights."""
    ignored = AUXILIARY.get(spec.removeprefix("torchvision:"), ())
    _fill_(model, _read(weights), at=f"{weights} in {spec}", ignore=ignored)


def imported(spec: str, error: type[DiffpruneError]) -> Callable[..., Any]:
    """The callable behind `package.module:name`. This runs the user's code: importing a module executes it.

    The current folder joins the import path, in front, as with `python -m`, and stays on it for later imports.

    Raises:
        error: the module cannot be imported, or has no such callable.
    """
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as cause:
        if cause.name is None or not f"{module_name}.".startswith(f"{cause.name}."):
            raise _failed(spec, error, f"importing {module_name} failed: {cause}") from cause
        raise error(
            f"there is no module {module_name}",
            at=spec,
            effect="nothing was run",
            fix="check the name, and run from the folder that holds the module or install it",
        ) from cause
    except (Exception, SystemExit) as cause:
        raise _failed(
            spec, error, f"importing {module_name} failed: {type(cause).__name__}: {_first_line(cause)}"
        ) from cause
    found: object = getattr(target, name, None)
    if not callable(found):
        fact, fix = f"module {module_name} has no {name}", "name a function or class after the colon"
        nearest = difflib.get_close_matches(name, vars(target), n=1)
        if hasattr(target, name):
            fact = f"{module_name}.{name} is {type(found).__name__}, not a function"
        elif nearest:
            fix = f"did you mean {module_name}:{nearest[0]}?"
        raise error(fact, at=spec, effect="nothing was run beyond the import", fix=fix)
    return found


def called(spec: str, function: Callable[..., Any], error: type[DiffpruneError], **arguments: Any) -> Any:
    """What the user's function returns; whatever it raises becomes `error`, with the cause chained."""
    try:
        return function(**arguments)
    except (Exception, SystemExit) as cause:
        raise _failed(spec, error, f"calling it raised {type(cause).__name__}: {_first_line(cause)}") from cause


def _failed(spec: str, error: type[DiffpruneError], fact: str) -> DiffpruneError:
    return error(fact, at=spec, effect="nothing was started", fix="run it in Python: the traceback shows the line")


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
    _known(name, dict.fromkeys(names), f"torchvision:{name}")
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
            f"{member} could not be downloaded or read: {_first_line(cause)}",
            at=at,
            effect=_UNTOUCHED,
            fix=f"go online once, or download {member.url} elsewhere and give that file as the weights",
        ) from cause
    return model


def _known(name: str, table: Mapping[str, T], spec: str) -> T:
    if name in table:
        return table[name]
    nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
    raise BadModel(
        f"there is no network {name!r}",
        at=spec,
        effect=_UNTOUCHED,
        fix=f"the nearest name is {nearest[0]}" if nearest else f"one of {', '.join(table)}",
    )


def _classes(num_classes: int | None) -> dict[str, int]:
    return {} if num_classes is None else {"num_classes": num_classes}


def _resize_head_(model: nn.Module, num_classes: int) -> None:
    """Give the classifier `num_classes` outputs: the last Linear in module order, without one the last Conv2d."""
    layers = dict(model.named_modules())
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    name = (linear or [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)])[-1]
    old = layers[name]
    fresh: nn.Module
    if isinstance(old, nn.Linear):
        if old.out_features == num_classes:
            return
        fresh = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d):
        if old.out_channels == num_classes:
            return
        height, width = old.kernel_size
        fresh = nn.Conv2d(old.in_channels, num_classes, (height, width), bias=old.bias is not None)
    model.set_submodule(name, fresh)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, by name."""
    state: Any
    try:
        if path.suffix.lower() == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as cause:
        reason = cause.strerror or _first_line(cause)
        raise _unread(path, f"the file cannot be read: {reason}", "give a readable weights file") from cause
    except Exception as cause:  # a damaged pickle raises almost anything
        foreign = re.search(r"Unsupported (?:global|class|operand).*?GLOBAL (\S+)", str(cause), re.DOTALL)
        if foreign is None:
            fact = f"the file is damaged or not a weights file: {_first_line(cause)}"
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


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _fill_(model: nn.Module, state: dict[str, Tensor], *, at: str, ignore: tuple[str, ...]) -> None:
    """Load the weights, all of them and nothing else, but for those of heads in `ignore`."""
    state = {key: value for key, value in state.items() if key.partition(".")[0] not in ignore}
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
            at=at,
            effect="no weights were loaded",
            fix="give the weights of this very network, with as many classes as the data",
        )
