"""The exporter's table of operators, made once: it makes one anew at every export."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

try:
    from torch.onnx._internal.exporter._registration import ONNXRegistry
except ImportError:  # it is torch's own affair; without it exports take longer
    Registry: Any = None
else:
    Registry = ONNXRegistry
    _original = vars(ONNXRegistry)["from_torchlib"]
    _made_anew: Any = ONNXRegistry.from_torchlib

LATE = ("torchvision::", "quantized_decomposed::")
"""Of the libraries that the exporter translates, those that torch knows only once they are imported."""


@contextmanager
def operators_once() -> Iterator[None]:
    """Inside, `torch.onnx.export` takes half the time for a small network from the second call on.

    It reads and translates the source of some 500 functions of onnxscript for its table. That comes out the same
    until torch learns such operators as torchvision's.
    """
    if Registry is None:
        yield
        return
    Registry.from_torchlib = staticmethod(_known)
    try:
        yield
    finally:
        Registry.from_torchlib = _original  # also where two exports overlap


def _known(*given: Any, **named: Any) -> Any:
    return _table(sum(name.startswith(LATE) for name in torch._C._dispatch_get_all_op_names()), *given, **named)


@cache
def _table(operators: int, *given: Any, **named: Any) -> Any:
    """For the time in which torch knows so many of the late operators."""
    return _made_anew(*given, **named)
