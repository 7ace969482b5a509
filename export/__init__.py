"""A dense ONNX file that computes what the network computes, and how long it takes, measured."""

from export.alignment import Step, default_step, probe_step
from export.comparison import Comparison, compare, compare_networks
from export.errors import BadOnnx, CannotMeasure, DeviceMissing, ExportError, NotExportable, ParityFailed
from export.latency import Latency
from export.machine import Machine, this_machine
from export.measurement import measure, measure_network
from export.parity import BatchParity, Parity, check_parity
from export.statistics import Interval
from export.writing import OnnxFile, to_onnx

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
    "Step",
    "check_parity",
    "compare",
    "compare_networks",
    "default_step",
    "measure",
    "measure_network",
    "probe_step",
    "this_machine",
    "to_onnx",
]
