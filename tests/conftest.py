"""What makes the suite quick without changing what it proves."""

import functools
import gc

import torch
import torch._export.utils
from onnxscript.values import TracedOnnxFunction
from torch.onnx._internal.exporter._registration import ONNXRegistry

import export.rounds

torch.set_num_threads(1)  # the networks are tiny: a second thread costs more than it computes
export.rounds.WARM_UP_SECONDS = 0.02  # and warm after ten runs, of which there are more anyway

# The exporter parses the source of its 500 operators and lists those of torch again for every export: once is enough.
_signature = TracedOnnxFunction.function_ir.fget
assert _signature is not None
TracedOnnxFunction.function_ir = property(functools.cache(_signature))  # type: ignore[misc]
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]
_listed = torch._export.utils._collect_all_valid_cia_ops_for_namespace
torch._export.utils._collect_all_valid_cia_ops_for_namespace = functools.cache(_listed)

gc.freeze()  # the million objects of torch are not looked through for garbage again and again
