"""A dense ONNX file that computes what the network computes, and how long it takes, measured."""

from export.alignment import Step, default_step, probe_step
from export.comparison import Comparison, compare
from export.errors import (
    BadOnnx,
    CannotMeasure,
    DeviceMissing,
    ExportError,
    NotExportable,
    NotQuantizable,
    ParityFailed,
)
from export.finishing import Quantized
from export.latency import Latency, measure
from export.machine import Machine, this_machine
from export.outputs import Fidelity, answers, fidelity
from export.parity import BatchParity, Parity, check_parity
from export.quantization import quantize, to_fp16
from export.statistics import Interval
from export.writing import OnnxFile, to_onnx

__all__ = [
    "BadOnnx",
    "BatchParity",
    "CannotMeasure",
    "Comparison",
    "DeviceMissing",
    "ExportError",
    "Fidelity",
    "Interval",
    "Latency",
    "Machine",
    "NotExportable",
    "NotQuantizable",
    "OnnxFile",
    "Parity",
    "ParityFailed",
    "Quantized",
    "Step",
    "answers",
    "check_parity",
    "compare",
    "default_step",
    "fidelity",
    "measure",
    "probe_step",
    "quantize",
    "this_machine",
    "to_fp16",
    "to_onnx",
]
