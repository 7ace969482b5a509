"""A dense ONNX file that computes what the network computes, and how long it takes, measured."""

from export.alignment import Step, default_step, probe_step
from export.comparison import Comparison, compare
from export.drafts import OnnxFile
from export.errors import BadOnnx, CannotMeasure, DeviceMissing, ExportError, NotExportable, ParityFailed
from export.latency import Latency, measure
from export.machine import Machine, this_machine
from export.parity import BatchParity, Parity, check_parity
from export.preprocessing import Preprocessing
from export.statistics import Interval
from export.twins import static_twin
from export.writing import to_onnx

__all__ = [
    "BadOnnx",
    "BatchParity",
    "CannotMeasure",
    "Comparison",
    "DeviceMissing",
    "ExportError",
    "Interval",
    "Latency",
    "Machine",
    "NotExportable",
    "OnnxFile",
    "Parity",
    "ParityFailed",
    "Preprocessing",
    "Step",
    "check_parity",
    "compare",
    "default_step",
    "measure",
    "probe_step",
    "static_twin",
    "this_machine",
    "to_onnx",
]
