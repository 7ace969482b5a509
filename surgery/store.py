"""Saving a cut network without pickle: its weights and what was kept; loading replays the cut on the dense network."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from surgery.cut import RECEIPT, Receipt
from surgery.errors import BadFile
from surgery.graph import SOURCE
from surgery.rebuilding import rebuilt, states

FORMAT = "diffprune-surgery-2"


def save(small: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights of a cut network and its receipt to a safetensors file, in one step (write, then rename).

    Raises BadFile if `small` was not made by `surgery.cut` (a copy of such a network is fine).
    """
    receipt: Receipt | None = getattr(small, RECEIPT, None)
    if receipt is None:
        raise _unsaved(
            path,
            f"{type(small).__name__} has no record of what was cut",
            "save the network that surgery.cut returned, or a copy of it; for a dense one use its state_dict",
        )
    tensors = {
        name: {"shape": receipt.shapes[name], "kept": {str(a): i for a, i in sorted(axes.items())}}
        for name, axes in sorted(receipt.kept.items())
    }
    plan = {"tensors": tensors, "sizes": dict(sorted(receipt.sizes.items()))}
    weights = _apart({name: t.detach().cpu().contiguous() for name, t in _persistent(small).items()})
    try:
        data = safetensors.torch.save(weights, {FORMAT: json.dumps(plan)})
    except KeyError as error:
        fact = f"safetensors holds no tensors of {error.args[0]}"
        raise _unsaved(path, fact, "keep such values as two real tensors") from error
    target = Path(path)
    if not target.parent.is_dir():
        raise _unsaved(path, f"there is no folder {target.parent}", "make it, or name a file in one that is there")
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that lie in memory of their own: safetensors refuses those that share it."""
    seen: set[int] = set()
    for name, tensor in weights.items():
        place = tensor.untyped_storage().data_ptr()
        weights[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return weights


def load(path: str | os.PathLike[str], factory: Callable[[], nn.Module]) -> nn.Module:
    """The cut network stored in `path`. `factory()` builds the dense one, whose weights are replaced.

    dtype is the file's, mode and requires_grad are the factory's. Raises BadFile.
    """
    receipt, tensors = _read(Path(path))
    model = factory()
    dense = states(model)
    for name, shape in receipt.shapes.items():
        found = tuple(dense[name].shape) if name in dense else None
        of_twin = name.endswith(SOURCE) or f"{name}{SOURCE}" in receipt.shapes  # made when the cut is replayed
        if found != shape and not (found is None and of_twin):
            raise _misfit(path, f"{name} has shape {found} in the network; {shape} was cut", model)
    try:
        kept = {n: {a: torch.tensor(i) for a, i in axes.items()} for n, axes in receipt.kept.items()}
        small = rebuilt(model, kept, receipt.sizes)
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise _misfit(path, f"the network has no place for the cut: {error}", model) from error
    cut = _persistent(small)
    if cut.keys() != tensors.keys():
        odd = sorted(cut.keys() ^ tensors.keys())
        raise _misfit(path, f"{len(odd)} tensors are only in one of file and network: {', '.join(odd[:3])}", model)
    for name, tensor in tensors.items():
        if tensor.shape != cut[name].shape:
            raise _misfit(path, f"{name} is {tuple(tensor.shape)}; the network has {tuple(cut[name].shape)}", model)
        _replace_(small, cut[name], tensor.to(cut[name].device))
    setattr(small, RECEIPT, receipt)
    return small


def _replace_(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put `new` wherever `old` is registered (tied weights: everywhere)."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for key, value in registry.items():
                if value is old:
                    registry[key] = new  # type: ignore[assignment]


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    """What a state_dict holds, tied tensors once, as the registered objects."""
    stored = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in states(model).items() if stored.get(name) is tensor}


def _read(path: Path) -> tuple[Receipt, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise ValueError("no record of a cut inside: not written by surgery.save")
            return _receipt(metadata[FORMAT]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise BadFile(
            f"{path.name} cannot be read: {error}",
            at="surgery.load",
            effect="no network was built",
            fix="give a file that surgery.save wrote; copy it again if it is damaged",
        ) from error


def _receipt(text: str) -> Receipt:
    """The record in a file. Raises ValueError unless each index counts upwards inside the dense shape."""
    try:
        record = json.loads(text)
        plan, sizes = record["tensors"], {str(name): int(n) for name, n in record["sizes"].items()}
        shapes = {str(name): tuple(int(n) for n in entry["shape"]) for name, entry in plan.items()}
        kept = {n: {int(a): tuple(int(i) for i in index) for a, index in plan[n]["kept"].items()} for n in shapes}
        if least := [name for name, n in sizes.items() if n < 1]:
            raise ValueError(f"the size {least[0]}")
        for name, axes in kept.items():
            for axis, index in axes.items():
                inside = range(shapes[name][axis])
                if axis < 0 or not index or list(index) != sorted({i for i in index if i in inside}):
                    raise ValueError(f"axis {axis} of {name}")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the record of the cut is damaged ({error})") from error
    return Receipt(shapes, kept, sizes)


def _unsaved(path: str | os.PathLike[str], fact: str, fix: str) -> BadFile:
    return BadFile(fact, at="surgery.save", effect=f"{Path(path).name} was not written", fix=fix)


def _misfit(path: str | os.PathLike[str], fact: str, model: nn.Module) -> BadFile:
    return BadFile(
        fact,
        at=f"surgery.load of {Path(path).name} into {type(model).__name__}",
        effect="no network was returned",
        fix="let the factory build the dense network that was cut, with the same arguments",
    )
