"""What makes the suite quick without changing what it proves."""

import functools

import torch
from onnxscript.values import TracedOnnxFunction

torch.set_num_threads(1)  # the networks are tiny: a second thread costs more than it computes

# onnxscript parses the source of its 500 operators again for every export, a second each: once is enough.
_signature = TracedOnnxFunction.function_ir.fget
assert _signature is not None
TracedOnnxFunction.function_ir = property(functools.cache(_signature))  # type: ignore[misc]
