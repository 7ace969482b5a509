"""The float32 file that becomes a smaller one, and the examples that say which values it has inside."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization.calibrate import create_calibrator
from torch import Tensor

from export.distance import Array
from export.errors import NotQuantizable
from export.files import stored_precision
from export.sessions import open_session


@dataclass(frozen=True)
class Source:
    """A float32 file with one input."""

    path: Path
    model: onnx.ModelProto
    input: Any

    @property
    def opset(self) -> int:
        return next(int(entry.version) for entry in self.model.opset_import if entry.domain == "")


def read_source(path: str | Path) -> Source:
    """Raises BadOnnx, and NotQuantizable for a file whose input or weights are not float32."""
    inputs = open_session(path).get_inputs()  # says what is wrong with a damaged file
    model = onnx.load(path, format="protobuf")
    for entry in (*model.opset_import, *model.graph.node):
        if entry.domain == "ai.onnx":  # the other name of the standard domain
            entry.domain = ""
    if len(inputs) != 1 or inputs[0].type != "tensor(float)":
        found = ", ".join(f"{value.name} {value.type}" for value in inputs)
        raise refused(f"the file takes {found}", path, "give a file with one float32 input, the images")
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise refused("the file is quantized already", path, "give the float32 file it was made from")
    if (held := stored_precision(Path(path))) != "fp32":
        raise refused(f"the file holds weights in {held}", path, "give the float32 file")
    return Source(Path(path), model, inputs[0])


def fitting(calibration: Iterable[Array | Tensor], source: Source) -> list[Array]:
    """The examples as arrays that the file takes. Raises NotQuantizable."""
    batches = [np.asarray(batch.detach().cpu() if isinstance(batch, Tensor) else batch) for batch in calibration]
    fix = "give batches like those the file was exported with: normalised float32 images, the batch on axis 0"
    wanted = tuple(source.input.shape)
    for position, batch in enumerate(batches):
        at = f"calibration batch {position} for {source.path}"
        if not _same_shape(batch.shape, wanted):
            raise refused(f"the batch has shape {batch.shape}, the file takes {wanted}", at, fix)
        if batch.dtype != np.float32:
            raise refused(f"the batch is {batch.dtype}, the file takes float32", at, fix)
        if not np.isfinite(batch).all():
            raise refused("the batch has values that are not finite", at, fix)
    if not batches:
        raise refused("there are no calibration examples", source.path, fix)
    return batches


def _same_shape(found: tuple[int, ...], wanted: tuple[int | str | None, ...]) -> bool:
    """Whether an array has the shape of an input, of which some axes are free; a batch of none does not."""
    if len(found) != len(wanted) or found[:1] in ((), (0,)):
        return False
    return all(not isinstance(size, int) or size == own for size, own in zip(wanted, found, strict=True))


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches as onnxruntime wants to be fed with them."""

    def __init__(self, name: str, batches: Sequence[Array]) -> None:
        self._feeds = iter([{name: batch} for batch in batches])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def largest(source: Source, batches: Sequence[Array], folder: Path) -> tuple[str, float]:
    """The tensor inside the network with the largest absolute value, and that value."""
    copy = folder / "float32.onnx"  # onnxruntime writes beside the file that it is given
    onnx.save(source.model, str(copy))
    calibrator = create_calibrator(copy, augmented_model_path=str(folder / "ranges.onnx"))
    calibrator.collect_data(Reader(source.input.name, batches))
    ranges = calibrator.compute_data().data
    reach = {name: float(np.abs(found.range_value).max()) for name, found in ranges.items()}
    return max(reach.items(), key=lambda item: item[1])


@contextmanager
def silent() -> Iterator[None]:
    """onnxruntime's tools log through the root logger, which would configure logging for the whole program."""
    root, handler, before = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(handler)


def refused(fact: str, at: object, fix: str) -> NotQuantizable:
    """The error for what is found before anything is written."""
    return NotQuantizable(fact, at=str(at), effect="nothing was written; an older file is untouched", fix=fix)
