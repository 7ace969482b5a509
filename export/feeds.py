"""Random inputs that fit an ONNX file, and running it on them without copies."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from export.errors import CannotMeasure

Feed = dict[str, npt.NDArray[Any]]

DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


@dataclass(frozen=True)
class InputSpec:
    """An input of a file at a given batch: name, full shape, onnxruntime's name of its type."""

    name: str
    shape: tuple[int, ...]
    type: str

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.type}"


def input_specs(session: Any, *, batch: int, path: Path) -> tuple[InputSpec, ...]:
    """The inputs of a session with axis 0 set to `batch`.

    Raises:
        CannotMeasure: a batch below 1, a file whose fixed batch is another one, another free axis, or an unusual type.
    """
    if batch < 1:
        raise CannotMeasure(f"batch {batch} asked", at="batch", effect="nothing was run", fix="ask for 1 or more")
    return tuple(
        InputSpec(value.name, _shape(value.name, list(value.shape), batch, path), _known_type(value, path))
        for value in session.get_inputs()
    )


def random_feed(specs: tuple[InputSpec, ...], *, seed: int) -> Feed:
    """Standard normal numbers, 0 to 255 for uint8, which are pixels, and 0 or 1 for other integers and booleans, which
    are valid indices into any table of two."""
    generator = np.random.default_rng(seed)
    feed: Feed = {}
    for spec in specs:
        dtype = DTYPES[spec.type]
        floating = np.issubdtype(dtype, np.floating)
        levels = 256 if dtype is np.uint8 else 2
        numbers = generator.standard_normal(spec.shape) if floating else generator.integers(0, levels, spec.shape)
        feed[spec.name] = np.ascontiguousarray(numbers.astype(dtype))
    return feed


def runner(session: Any, feed: Feed, *, device: str) -> Callable[[], object]:
    """A function that runs the session once and returns when the result is there.

    On a GPU inputs and outputs stay on the device (the transfer is not part of the network), and every run waits for
    the device: without that, only the time to queue the work would be measured.
    """
    if device == "cpu":
        return lambda: session.run(None, feed)
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device, 0)
    binding.synchronize_inputs()

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def _shape(name: str, shape: list[int | str | None], batch: int, path: Path) -> tuple[int, ...]:
    for axis, size in enumerate(shape):
        if axis > 0 and not isinstance(size, int):
            raise CannotMeasure(
                f"axis {axis} of input {name}, {size or 'unnamed'}, has no fixed size", at=f"{path}, shape {shape}",
                effect="nothing was run", fix="export with all axes but the batch fixed",
            )
    if shape and isinstance(shape[0], int) and shape[0] != batch:
        raise CannotMeasure(
            f"input {name} has the fixed batch {shape[0]}, asked was {batch}", at=f"{path}, shape {shape}",
            effect="nothing was run", fix=f"measure with batch={shape[0]}, or export with a free batch",
        )
    return (batch, *(size for size in shape[1:] if isinstance(size, int))) if shape else ()


def _known_type(value: Any, path: Path) -> str:
    if value.type not in DTYPES:
        raise CannotMeasure(
            f"input {value.name} has type {value.type}", at=str(path), effect="nothing was run",
            fix=f"use inputs of one of the types {', '.join(DTYPES)}",
        )
    return str(value.type)
