"""Sums of products: matmul, einsum, attention. One rule in letters, as einsum writes them.

An operand's channels along a summed letter belong to what the sum computes: they are tied, and the result carries
their name. So query, key and value of an attention head meet in one unit, because the head is a letter that all keep.
A parameter as the second factor is a linear layer: it reads the summed letter and writes its own.
"""

import string
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.names import varying
from surgery.observed import State
from surgery.rules import CannotFollow, Rule, meet, rows

if TYPE_CHECKING:
    from surgery.call import Call


def contract(call: "Call", terms: list[str], out: str, operands: list[Any]) -> Tensor:
    """The names of the sum of products of `operands`, whose axes are lettered by `terms`; those in `out` remain."""
    weights = [i for i, operand in enumerate(operands) if isinstance(operand, State)]
    if len(weights) == 1 and len(operands) == 2:
        i = weights[0]
        return _weighted(call, terms[1 - i], operands[1 - i], terms[i], operands[i], out)
    named = [call.element_names(o) if isinstance(o, State) else o for o in operands]
    summed = {letter for term in terms for letter in term if letter not in out}
    along = [{term[axis] for axis in varying(names)} for term, names in zip(terms, named, strict=True)]
    for letter in summed:
        mixed = [letters for letters in along if letter in letters]
        if len(mixed) == 1 and not mixed[0] - summed:  # where a kept letter (the head) tells them apart, they are tied
            raise CannotFollow("sums over the channels")
    parts = [_laid_out(call, term, names, out, summed) for term, names in zip(terms, named, strict=True)]
    lines = [set(varying(part)) for part in parts]
    if len(parts) > 1 and all(lines) and not set.intersection(*lines):
        parts = _beside_positions(call, named, parts)
    return meet(call, parts)


def _beside_positions(call: "Call", named: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    """Relative positions: a parameter that every head is multiplied with has places where others have channels."""
    own = [call.of_parameter(names) for names in named]
    if sum(own) != 1 or len(parts) != 2:
        raise CannotFollow("multiplies channels by channels")
    call.names.pin(named[own.index(True)], f"{call.name} at {call.where} multiplies every head with it")
    return [part for part, positions in zip(parts, own, strict=True) if not positions]


def _laid_out(call: "Call", term: str, names: Tensor, out: str, summed: set[str]) -> Tensor:
    """`names` with the axes of `out`; what was summed is tied and gone."""
    for axis in reversed(range(len(term))):
        if term[axis] in summed:
            first = names.narrow(axis, 0, 1)
            if axis in varying(names):
                call.names.tie(first, names)
            names = first.squeeze(axis)
    kept = [letter for letter in term if letter not in summed]
    names = names.permute([kept.index(letter) for letter in out if letter in kept])
    for axis, letter in enumerate(out):
        if letter not in kept:
            names = names.unsqueeze(axis)
    return names


def _weighted(call: "Call", term: str, x: Any, letters: str, weight: State, out: str) -> Tensor:
    reads = [letter for letter in letters if letter in term and letter not in out]
    writes = [letter for letter in letters if letter not in term and letter in out]
    if len(reads) != 1 or len(writes) != 1 or len(letters) != 2:
        raise CannotFollow(f"uses {weight.name} as more than a linear layer")
    call.read(weight, letters.index(reads[0]), call.vector(x, term.index(reads[0])))
    written = call.write(weight, letters.index(writes[0]))
    call.count(weight, outputs_per_channel=call.shape.numel() / weight.shape[letters.index(writes[0])])
    return call.spread(written, out.index(writes[0]))


def einsum(call: "Call", equation: str, operands: list[Any], *_: Any, **__: Any) -> Tensor:
    given, out = equation.replace(" ", "").partition("->")[::2]
    *terms, out = _lettered([*given.split(","), out], [len(operand.shape) for operand in operands])
    if not out or any(len(set(term)) < len(term) for term in terms):
        raise CannotFollow(f"{equation} is not followed")
    return contract(call, terms, out, operands)


def _lettered(terms: list[str], ranks: list[int]) -> list[str]:
    """Letters in place of "...", whose axes broadcast as those of matmul do."""
    counts = [max(0, rank - len(term) + 3) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=False)]
    free = "".join(letter for letter in string.ascii_letters if letter not in "".join(terms))[: max(counts)]
    return [term.replace("...", free[len(free) - n :]) for term, n in zip(terms, [*counts, len(free)], strict=True)]


def matmul(call: "Call", a: Any, b: Any) -> Tensor:
    """(..., m, k) @ (..., k, n); leading axes broadcast, vectors have one axis."""
    ranks = [len(a.shape), len(b.shape)]
    batch = string.ascii_lowercase[: max(0, max(ranks) - 2)]
    first = batch[len(batch) - max(0, ranks[0] - 2) :] + ("MK" if ranks[0] > 1 else "K")
    second = batch[len(batch) - max(0, ranks[1] - 2) :] + ("KN" if ranks[1] > 1 else "K")
    out = batch + ("M" if ranks[0] > 1 else "") + ("N" if ranks[1] > 1 else "")
    return contract(call, [first, second], out, [a, b])


def add_matmul(call: "Call", c: Any, a: Any, b: Any, **_: Any) -> Tensor:
    """c + a @ b."""
    product = matmul(call, a, b)
    return meet(call, [product, call.element_names(c) if isinstance(c, State) else c])


def attention(call: "Call", q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *_: Any, **named: Any) -> Tensor:
    """softmax(q k^T + mask) v over (..., tokens, head channels); with enable_gqa several query heads share a key."""
    if named.get("enable_gqa") and q.shape[-3] != k.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    batch = string.ascii_lowercase[: q.dim() - 2]
    scores: Any = _Within(call, [*q.shape[:-1], k.shape[-2]])
    weights = contract(scores, [batch + "ME", batch + "NE"], batch + "MN", [q, k])
    if isinstance(mask, Tensor):
        weights = meet(scores, [weights, mask])
    return contract(call, [batch + "MN", batch + "NE"], batch + "ME", [weights, v])


class _Within:
    """A step inside of an operator: the same call with another shape of its result."""

    def __init__(self, call: "Call", shape: list[int]) -> None:
        self._call, self.shape = call, torch.Size(shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


CONTRACTION_RULES: dict[str, Rule] = {
    **rows(matmul, "matmul bmm mm mv"),
    **rows(add_matmul, "addmm baddbmm addbmm"),
    **rows(einsum, "einsum"),
    **rows(attention, "scaled_dot_product_attention"),
}
CONTRACTIONS: tuple[Rule, ...] = (matmul, add_matmul, einsum)
"""The rules that take a parameter as such in any place."""
