"""What all rules share."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.names import NEUTRAL, dense, together, varying

if TYPE_CHECKING:
    from surgery.call import Call

Rule = Callable[..., Any]


class CannotFollow(Exception):
    """The rule of an operator does not cover this use of it; the text is the reason for pinning."""


def rows(rule: Rule, names: str) -> dict[str, Rule]:
    """One row of a table per operator name."""
    return dict.fromkeys(names.split(), rule)


def elementwise(call: "Call", *args: Any, **kwargs: Any) -> Tensor:
    """Ties the names that meet. What is broadcast over channels serves all of them, so it is pinned, not tied."""
    return meet(call, [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)])


def meet(call: "Call", operands: list[Tensor]) -> Tensor:
    """The names of an element-wise operation of `operands`, which broadcast to the shape of the result."""
    whole = [names.expand(call.shape) for names in operands if not _is_broadcast(call, names, operands)]
    return join(call, _one_width(call, whole)) if whole else call.neutral()


def _one_width(call: "Call", whole: list[Tensor]) -> list[Tensor]:
    """Channels along one axis that meet channels along another serve all of these: the later written are pinned."""
    if len(whole) == 1:
        return whole
    lines = [set(varying(names)) for names in whole]
    oldest = min((int(dense(names).max()), i) for i, names in enumerate(whole) if lines[i])[1] if any(lines) else 0
    left = []
    for names, line in zip(whole, lines, strict=True):
        if line and not line & lines[oldest]:
            call.names.pin(names, f"{call.name} at {call.where} meets it with the channels of another axis")
        else:
            left.append(names)
    return left


def join(call: "Call", parts: Sequence[Tensor]) -> Tensor:
    """Names of one shape that meet element by element."""
    first, *rest = sorted(parts, key=lambda names: dense(names).numel())  # all are tied: go on with the shortest
    for part in rest:
        call.names.tie(first, part)
    constant = [bool((dense(part) == NEUTRAL).any()) for part in (first, *rest)]
    if constant[0] and not all(constant):
        first = together(_first_name, [first, *rest])
    if any(constant) and rest:
        call.doubt(first, "meets a constant made in the forward, as wide as the channels", of_values=True)
    return first


def _first_name(*parts: Tensor) -> Tensor:
    result = parts[0]
    for part in parts[1:]:
        result = torch.where(result == NEUTRAL, part, result)
    return result


def _is_broadcast(call: "Call", names: Tensor, operands: list[Tensor]) -> bool:
    """Is `names` repeated along an axis in which the channels of another operand differ?

    One that differs itself along a further axis (a factor per head) is tied to all that it serves; one that is the
    same for all channels is pinned.
    """
    rank = len(call.shape)
    channel_axes = {axis - other.dim() + rank for other in operands for axis in varying(other)}
    missing = set(range(rank - names.dim())) | {a + rank - names.dim() for a, n in enumerate(names.shape) if n == 1}
    repeated = {axis for axis in missing & channel_axes if call.shape[axis] > 1}
    if not repeated or varying(names):
        return False
    if (dense(names) != NEUTRAL).any():
        call.names.pin(names, f"{call.name} at {call.where} broadcasts it over other channels")
    return True


def tie_along(call: "Call", x: Tensor, axes: set[int], verb: str) -> None:
    """An operator that mixes along `axes`: channels that differ there and elsewhere are tied, else nothing is left."""
    mixed = axes & set(varying(x))
    if mixed and mixed == set(varying(x)):
        raise CannotFollow(f"{verb} the channels")
    for axis in mixed:
        call.names.tie(x, x.narrow(axis, 0, 1))
