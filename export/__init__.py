"""A dense ONNX file that computes what the network computes, and how long it takes, measured."""

from export.errors import BadOnnx, CannotMeasure, DeviceMissing, ExportError, NotExportable, ParityFailed
from export.parity import BatchParity, Parity, check_parity
from export.writing import OnnxFile, to_onnx

__all__ = [
    "BadOnnx",
    "BatchParity",
    "CannotMeasure",
    "DeviceMissing",
    "ExportError",
    "NotExportable",
    "OnnxFile",
    "Parity",
    "ParityFailed",
    "check_parity",
    "to_onnx",
]
