"""Smaller numbers: a float32 ONNX file as one of int8 or float16, made by onnxruntime's own tools and checked."""

import copy
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor

from export.calibration import Reader, fitting, largest, read_source, refused, silent
from export.distance import Array
from export.drafts import hidden, require_writable
from export.finishing import Quantized, finished
from export.recipes import RECIPES, WEIGHTED, resolved

FLOAT16_MAX = float(np.finfo(np.float16).max)
# Typical for float16 is 1e-3, as it keeps 11 bits of each number.
FLOAT16_TOLERANCE = 1e-2
PER_CHANNEL_OPSET = 13
"""The first one whose DequantizeLinear has a scale for every channel."""
TYPES = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}


def quantize(
    path: str | Path, output: str | Path, calibration: Iterable[Array | Tensor], *, target: str = "x86"
) -> Quantized:
    """Write the float32 file at `path` with int8 weights and activations (static QDQ) to `output`.

    Ranges of activations are the smallest and largest values seen. Names, shapes, opset and metadata stay, and inputs
    and outputs stay float32; the metadata gain "quantization" and "float32_sha256". The same file, examples and target
    give the same bytes.

    Args:
        calibration: batches of inputs (batch, ...) float32, as the network is used: normalised, not augmented. A few
            hundred images are enough, and more do not help: ranges only grow, and with them the steps.
        target: "x86", which is this CPU's "x86-vnni" or "x86-avx2" (for CPUs without VNNI; 7-bit weights), or
            "tensorrt", symmetric with int8 activations. See `export.recipes`.

    Raises:
        NotQuantizable: an unknown target, a file without layers to quantize or of an opset below 13, examples that do
            not fit.
        NotExportable: `output` is not a place for a file, or what came out breaks a law of `to_onnx`.
        BadOnnx: the file is missing or damaged.
    """
    name = resolved(target)
    source, place = read_source(path), require_writable(output)
    batches = fitting(calibration, source)
    if not any(node.op_type in WEIGHTED for node in source.model.graph.node):
        raise refused(f"the file has no {', '.join(WEIGHTED)} to quantize", source.path, "give a file with weights")
    if source.opset < PER_CHANNEL_OPSET:
        raise refused(
            f"the file has opset {source.opset}; int8 weights with a scale per channel need {PER_CHANNEL_OPSET}",
            source.path, "export it with a newer opset, or convert it with onnx.version_converter",
        )
    recipe = RECIPES[name]
    with hidden(place) as folder:
        draft = folder / "quantized.onnx"
        with silent():
            quantize_static(
                _prepared(source.model), draft, Reader(source.input.name, batches), quant_format=QuantFormat.QDQ,
                per_channel=True, activation_type=TYPES[recipe.activations], weight_type=QuantType.QInt8,
                reduce_range=recipe.weight_bits == 7, op_types_to_quantize=list(recipe.operators),
                extra_options=dict(recipe.options),
            )
        about = {
            "precision": "int8", "target": name, "activations": recipe.activations, "weights": "int8 per channel",
            "weight_bits": recipe.weight_bits, "calibration": "MinMax",
        }
        return finished(onnx.load(draft, format="protobuf"), source, place, batches, about)


def to_fp16(path: str | Path, output: str | Path, examples: Iterable[Array | Tensor]) -> Quantized:
    """Write the float32 file at `path` with float16 inside to `output`; its inputs and outputs stay float32.

    For GPUs: on the CPU onnxruntime computes most of it in float32, with casts between. That also hides values beyond
    float16 there, so they are looked for in the float32 network.

    Args:
        examples: batches of inputs (batch, ...) float32, as the network is used.

    Raises:
        NotQuantizable: a value inside the network is beyond float16, or the examples do not fit.
        ParityFailed: off by more than FLOAT16_TOLERANCE of the largest output.
        NotExportable, BadOnnx: as `quantize`.
    """
    source, place = read_source(path), require_writable(output)
    batches = fitting(examples, source)
    with hidden(place) as folder, silent():
        tensor, reach = largest(source, batches, folder)
        if not reach <= FLOAT16_MAX:
            raise refused(
                f"the values of {tensor} reach {reach:.3g}, float16 ends at {FLOAT16_MAX:g}", source.path,
                "keep float32, or use int8",
            )
        small = convert_float_to_float16(_without_types(source.model), keep_io_types=True)
    return finished(small, source, place, batches, {"precision": "fp16"}, tolerance=FLOAT16_TOLERANCE)


def _without_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that says nothing of the values inside: the converter calls all of them float16, also those it keeps."""
    bare = copy.deepcopy(model)
    del bare.graph.value_info[:]
    return bare


def _prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that onnxruntime takes for one its preparation went over: `to_onnx` has folded all there is to fold."""
    prepared = copy.deepcopy(model)
    prepared.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    return prepared
