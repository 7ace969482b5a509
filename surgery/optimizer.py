"""An optimizer goes on with the cut network: parameters are exchanged in place, their state is cut as they were."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.cut import RECEIPT, Receipt
from surgery.errors import NotCarried
from surgery.rebuilding import sliced


def carry_optimizer_(optimizer: Optimizer, model: nn.Module, small: nn.Module) -> None:
    """Let `optimizer` of `model` go on with `small`, which `surgery.cut` made of `model`.

    Every parameter of `model` in the param groups gives way to the one of the same name in `small`; the order, the
    hyper-parameters and parameters of other networks stay. State of the shape of its parameter (momentum_buffer,
    exp_avg, ...) loses the channels that the parameter lost and keeps dtype and layout; scalars such as `step` stay.
    `model` may be a cut network itself. Gradients are not carried.
    Raises NotCarried, before anything is changed, if `small` does not fit or a state has another shape.
    """
    lost = _lost(model, small)
    names = {parameter: name for name, parameter in model.named_parameters()}
    successors = dict(small.named_parameters())
    state: dict[nn.Parameter, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for old in (p for p in group["params"] if p in names):
            before = optimizer.state.get(old, {})
            state[old] = {key: _carried(value, key, names[old], old, lost[names[old]]) for key, value in before.items()}
    if not state:
        raise NotCarried(
            f"{type(optimizer).__name__} has no parameter of {type(model).__name__}",
            at="surgery.carry_optimizer_",
            effect="nothing was changed",
            fix="give the optimizer of the network that was cut, and that network, not a copy of it",
        )
    for group in optimizer.param_groups:
        group["params"][:] = [successors[names[p]] if p in names else p for p in group["params"]]
    for old, after in state.items():
        if optimizer.state.pop(old, None) is not None:
            optimizer.state[successors[names[old]]] = after


def _lost(model: nn.Module, small: nn.Module) -> dict[str, dict[int, Tensor]]:
    """Per parameter and axis that became shorter, the indices in `model` that are left in `small`."""
    after: Receipt | None = getattr(small, RECEIPT, None)
    if after is None:
        raise _misfit(f"{type(small).__name__} has no record of what was cut", model)
    before = getattr(model, RECEIPT, None) or Receipt({}, {})
    olds, news = dict(model.named_parameters()), dict(small.named_parameters())
    if odd := sorted(olds.keys() ^ news.keys()):
        raise _misfit(f"{len(odd)} parameters are only in one of both networks: {', '.join(odd[:3])}", model)
    found = {}
    for name, old in olds.items():
        places = _places(_lying(before, name, old), _lying(after, name, news[name]))
        if places is None:
            shapes = f"{tuple(old.shape)} to {tuple(news[name].shape)}"
            raise _misfit(f"the record of the cut does not lead from {name} of shape {shapes}", model)
        found[name] = places
    return found


def _lying(receipt: Receipt, name: str, parameter: Tensor) -> list[tuple[int, tuple[int, ...]]] | None:
    """Per axis the dense length and which dense indices lie along it. None if they are not as many as the axis has."""
    dense, kept = receipt.shapes.get(name, tuple(parameter.shape)), receipt.kept.get(name, {})
    axes = [(length, kept.get(axis, tuple(range(length)))) for axis, length in enumerate(dense)]
    return axes if tuple(len(index) for _, index in axes) == parameter.shape else None


def _places(
    old: list[tuple[int, tuple[int, ...]]] | None, new: list[tuple[int, tuple[int, ...]]] | None
) -> dict[int, Tensor] | None:
    """Where the dense indices of `new` lie among those of `old`, on the axes that differ. None if some are missing."""
    if old is None or new is None or [length for length, _ in old] != [length for length, _ in new]:
        return None
    found = {}
    for axis, ((_, was), (_, now)) in enumerate(zip(old, new, strict=True)):
        place = {index: i for i, index in enumerate(was)}
        if not place.keys() >= set(now):
            return None
        if was != now:
            found[axis] = torch.tensor([place[index] for index in now])
    return found


def _carried(value: Any, key: str, name: str, parameter: Tensor, lost: Mapping[int, Tensor]) -> Any:
    """One entry of the state of `parameter`, for its successor."""
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return sliced(value, lost)
    if isinstance(value, int | float | None) or (isinstance(value, Tensor) and value.dim() == 0):
        return value
    what = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
    raise NotCarried(
        f"the state {key} of {name} {what}; the parameter has shape {tuple(parameter.shape)}",
        at="surgery.carry_optimizer_",
        effect="nothing was changed: which of its numbers belong to the channels that were cut is not known",
        fix="make a new optimizer for the cut network; SGD, Adam and all that keep state per element are carried",
    )


def _misfit(fact: str, model: nn.Module) -> NotCarried:
    return NotCarried(
        fact,
        at=f"surgery.carry_optimizer_ from {type(model).__name__}",
        effect="nothing was changed",
        fix="give the network that surgery.cut was called with and the one that it returned, or one loaded of it",
    )
