"""A dense ONNX file that computes what the network computes, and how long it takes, measured."""

from export.alignment import Step, default_step
from export.comparison import Comparison, compare, compare_networks
from export.drafts import OnnxFile
from export.dropping import ending_in_sums
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
from export.latency import Latency
from export.layer_kinds import LayerKind, TimedLayer, Widths
from export.layer_table import cache_folder, layer_table
from export.layers import layers_of
from export.machine import Machine, this_machine
from export.measurement import measure, measure_network
from export.outputs import Fidelity, answers, answers_of, fidelity
from export.parity import BatchParity, Parity, check_parity
from export.preprocessing import Preprocessing
from export.probe import probe_step
from export.profiling import NodeTime, profile
from export.quantization import quantize, to_fp16
from export.roofline import Roofline, measure_roofline
from export.settings import Settings
from export.statistics import Interval
from export.tensors import Examples
from export.torch_layers import network_layers
from export.twins import static_twin
from export.writing import for_timing, to_onnx

__all__ = [
    "BadOnnx",
    "BatchParity",
    "CannotMeasure",
    "Comparison",
    "DeviceMissing",
    "Examples",
    "ExportError",
    "Fidelity",
    "Interval",
    "Latency",
    "LayerKind",
    "Machine",
    "NodeTime",
    "NotExportable",
    "NotQuantizable",
    "OnnxFile",
    "Parity",
    "ParityFailed",
    "Preprocessing",
    "Quantized",
    "Roofline",
    "Settings",
    "Step",
    "TimedLayer",
    "Widths",
    "answers",
    "answers_of",
    "cache_folder",
    "check_parity",
    "compare",
    "compare_networks",
    "default_step",
    "ending_in_sums",
    "fidelity",
    "for_timing",
    "layer_table",
    "layers_of",
    "measure",
    "measure_network",
    "measure_roofline",
    "network_layers",
    "probe_step",
    "profile",
    "quantize",
    "static_twin",
    "this_machine",
    "to_fp16",
    "to_onnx",
]
