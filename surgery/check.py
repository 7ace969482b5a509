"""The oracle: two networks that must compute the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.capture import ExampleInputs, as_call, evaluating, own_random_state, tensors_in
from surgery.errors import NotEqual

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative error that rounding explains. Measured on cut networks: 1e-16, 1e-7, 1e-3, 1e-2."""


def check_equal(
    masked: nn.Module, small: nn.Module, example_inputs: ExampleInputs, *, tolerance: float | None = None
) -> float:
    """max |difference| / max |reference| over all outputs of two networks in eval mode; the reference is `masked`.

    Raises NotEqual above `tolerance` (default by dtype, TOLERANCE), for outputs of other shapes or structure, for
    outputs that are not finite, for a constant reference, with which any check would pass, and where only `small`
    fails to run.
    """
    at = f"{type(masked).__name__}, masked against cut"
    with torch.no_grad(), evaluating(masked, small):
        reference = run(masked, example_inputs)
        try:
            output = run(small, example_inputs)
        except Exception as error:
            fact = f"the cut network does not run: {type(error).__name__}: {' '.join(str(error).split())}"
            fix = "see the chained error; where one unit is left, keep two: squeeze() drops such an axis"
            raise _not_equal(fact, at, fix) from error
    return compare(reference, output, at, tolerance)


def compare(masked: Any, small: Any, at: str, tolerance: float | None = None) -> float:
    """`check_equal` for outputs that are there already."""
    (references, asked), (outputs, found) = _tensors(masked), _tensors(small)
    if asked != found:
        raise _not_equal(f"outputs are {found}; {asked} is asked", at)
    if not references:
        raise _not_equal("the output holds no tensor, so the check could not fail", at)
    worst, varied = 0.0, False
    for i, (reference, output) in enumerate(zip(references, outputs, strict=True)):
        limit = TOLERANCE.get(reference.dtype, 1e-5) if tolerance is None else tolerance
        floating = reference.is_floating_point()
        reference, output = reference.cpu().double(), output.cpu().double()
        if not (reference.isfinite().all() and output.isfinite().all()):
            raise _not_equal(f"output {i} holds values that are not finite", at)
        scale = reference.abs().max().item() if reference.numel() else 0.0
        constant = scale == 0.0 or (reference.numel() > 1 and bool((reference == reference.flatten()[0]).all()))
        if constant and floating:
            raise _not_equal(f"output {i} of the reference is constant, so the check could not fail", at)
        varied |= not constant
        error = (reference - output).abs().max().item() / (scale or 1.0) if reference.numel() else 0.0
        if error > limit:
            raise _not_equal(f"output {i} differs by {error:.1e} of its largest value; {limit:.0e} is allowed", at)
        worst = max(worst, error)
    if not varied:
        raise _not_equal("every output of the reference is constant, so the check could not fail", at)
    return worst


def run(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    # Inputs of its own, which it may write into.
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, torch.clone, as_call(example_inputs))
    with own_random_state(model), without_tf32():  # both draw the same numbers, if they draw any
        return model(*args, **kwargs)


@contextmanager
def without_tf32() -> Iterator[None]:
    """float32 has all its digits inside. On a GPU convolutions round to 10 bits by default: 4e-4 of a cut network."""
    backends: Any = torch.backends
    kinds = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def _tensors(output: Any) -> tuple[list[Tensor], str]:
    """The tensors of an output, and its structure as text."""
    return tensors_in(output), str(torch.utils._pytree.tree_map(_Leaf, output))


class _Leaf:
    """Shows itself as dtype and shape, or as the type of what is not a tensor."""

    def __init__(self, value: Any) -> None:
        tensor = isinstance(value, Tensor)
        self.text = f"{str(value.dtype)[6:]} {tuple(value.shape)}" if tensor else type(value).__name__

    def __repr__(self) -> str:
        return self.text


def _not_equal(
    fact: str,
    at: str,
    fix: str = "check that both come from the same weights and keep, and that the example gives an output that varies",
) -> NotEqual:
    return NotEqual(fact, at=at, effect="the cut network must not be used", fix=fix)
