"""The exporter's table of operators, made once: it makes one anew at every export."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

_made_anew: Any = ONNXRegistry.from_torchlib


@contextmanager
def operators_once() -> Iterator[None]:
    """Inside, `torch.onnx.export` takes half the time for a small network from the second call on.

    It reads and translates the source of some 500 functions of onnxscript for its table. That comes out the same
    until torch knows other operators, such as torchvision's.
    """
    replaceable: Any = ONNXRegistry
    before = vars(replaceable)["from_torchlib"]
    replaceable.from_torchlib = staticmethod(_known)
    try:
        yield
    finally:
        replaceable.from_torchlib = before


def _known(opset_version: int) -> Any:
    return _table(opset_version, len(torch._C._dispatch_get_all_op_names()))


@cache
def _table(opset_version: int, operators: int) -> Any:
    """For the time in which torch knows so many operators."""
    return _made_anew(opset_version=opset_version)
