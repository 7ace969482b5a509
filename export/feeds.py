"""Random inputs that fit an ONNX file, and running it on them without copies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from export.errors import BadOnnx, CannotMeasure, one_line
from export.settings import at_least_one

Feed = dict[str, npt.NDArray[Any]]
Shapes = Mapping[str, Sequence[int]]

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


Axes = Sequence[int | str | None]


@dataclass(frozen=True)
class InputSpec:
    """An input at a given batch: name, full shape, the runtime's name of its type."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def values(self) -> str:
        """What it is fed with."""
        if self.type not in DTYPES:
            return "as given"
        if np.issubdtype(DTYPES[self.type], np.floating):
            return "standard normal"
        return "0 to 255" if DTYPES[self.type] is np.uint8 else "0 or 1"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"name": self.name, "shape": list(self.shape), "type": self.type, "values": self.values}

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.type}"


def input_specs(session: Any, *, batch: int, path: Path, shapes: Shapes | None = None) -> tuple[InputSpec, ...]:
    """The inputs of a session, axis 0 of the first one set to `batch`, as that of all others where it is free.

    Args:
        shapes: by the name of an input the sizes of all its axes but the first, for files that leave them free.

    Raises:
        CannotMeasure: a batch below 1, a file whose fixed batch is another one, a free axis whose size is not given,
            a size that the file contradicts, or an unusual type.
    """
    at_least_one(batch, f"batch {batch}", at="batch")
    inputs, shapes = session.get_inputs(), shapes or {}
    names = [value.name for value in inputs]
    if unknown := [name for name in shapes if name not in names]:
        raise CannotMeasure(
            f"there is no input {', '.join(unknown)}; there {'is' if len(names) == 1 else 'are'} {', '.join(names)}",
            at=str(path), effect="nothing was run", fix="name one of these",
        )
    found: list[InputSpec] = []
    for value in inputs:
        # The runtime has no shape of a scalar, nor of what the file says nothing about; sizes that are given tell.
        declared = list(value.shape) or ([None] * (1 + len(shapes[value.name])) if value.name in shapes else [])
        # Behind the first input a fixed first axis need not be a batch: it may belong to a table that all share.
        first = declared[0] if found and declared and isinstance(declared[0], int) else batch
        asked = (first, *shapes[value.name]) if value.name in shapes else (first, *declared[1:])
        found.append(InputSpec(value.name, _shape(value.name, declared, asked, path), _known_type(value, path)))
    if batch > 1 and not any(spec.shape[:1] == (batch,) for spec in found):
        raise CannotMeasure(
            f"a batch of {batch} was asked for; no axis of {', '.join(names) or 'an input'} can take it",
            at=str(path), effect="nothing was run", fix="measure it at batch 1, or give the sizes of its inputs",
        )
    return tuple(found)


def random_feed(specs: tuple[InputSpec, ...], *, seed: int) -> Feed:
    """Standard normal numbers, 0 to 255 for uint8, which are pixels, and 0 or 1 for other integers and booleans, which
    are valid indices into any table of two."""
    generator = np.random.default_rng(seed)
    return {spec.name: _random(spec, generator) for spec in specs}


def _random(spec: InputSpec, generator: np.random.Generator) -> npt.NDArray[Any]:
    dtype = DTYPES[spec.type]
    floating = np.issubdtype(dtype, np.floating)
    levels = 256 if dtype is np.uint8 else 2
    try:
        numbers = generator.standard_normal(spec.shape) if floating else generator.integers(0, levels, spec.shape)
        return np.ascontiguousarray(numbers.astype(dtype))
    except (MemoryError, ValueError) as error:  # ValueError: more elements than numpy can count
        raise CannotMeasure(
            f"there is no memory for {spec.name} of shape {spec.shape}: {error}",
            at="the random inputs", effect="nothing was run", fix="ask for a smaller batch or smaller sizes",
        ) from error


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


def tried(run: Callable[[], object], path: Path, specs: Sequence[InputSpec]) -> None:
    """Run a file once. Raises BadOnnx if it does not run on inputs of the shapes it declares."""
    fix = "export the network again; export.to_onnx tries several batch sizes before it hands out a file"
    if bare := [spec.name for spec in specs if not spec.shape]:
        fix = f"the file says no sizes of input {bare[0]}, so a single number was tried: {_give_sizes(bare[0])}"
    try:
        run()
    except Exception as error:
        raise BadOnnx(
            f"onnxruntime cannot run the file: {one_line(error)}",
            at=f"{path} with {', '.join(map(str, specs))}", effect="nothing was measured", fix=fix,
        ) from error


def _give_sizes(name: str) -> str:
    return f"give the sizes behind the batch: shapes={{{name!r}: (3, 224, 224)}} or --input {name}=3,224,224"


def _shape(name: str, declared: Axes, asked: Axes, path: Path) -> tuple[int, ...]:
    """`asked`, if all of it are sizes and `declared`, the file's own, allows them; () for a scalar."""
    if not declared:
        return ()
    at = f"{path}, shape {declared}"
    if len(asked) != len(declared):
        raise CannotMeasure(
            f"input {name} has {len(declared) - 1} axes beside the batch, given were sizes for {len(asked) - 1}", at=at,
            effect="nothing was run", fix="give a size for each",
        )
    for axis, (own, size) in enumerate(zip(declared, asked, strict=True)):
        if not isinstance(size, int):
            raise CannotMeasure(
                f"axis {axis} of input {name}, {size or 'unnamed'}, has no fixed size", at=at, effect="nothing was run",
                fix=_give_sizes(name),
            )
        if isinstance(own, int) and own != size and axis == 0:
            raise CannotMeasure(
                f"input {name} has the fixed batch {own}, asked was {size}", at=at, effect="nothing was run",
                fix=f"measure with batch={own}, or export with a free batch",
            )
        if size < 1 or (isinstance(own, int) and own != size):
            raise CannotMeasure(
                f"axis {axis} of input {name} is {own}, asked was {size}", at=at, effect="nothing was run",
                fix="give sizes of 1 or more, and those that the file fixes as they are",
            )
    return tuple(size for size in asked if isinstance(size, int))


def _known_type(value: Any, path: Path) -> str:
    if value.type not in DTYPES:
        raise CannotMeasure(
            f"input {value.name} has type {value.type}", at=str(path), effect="nothing was run",
            fix=f"use inputs of one of the types {', '.join(DTYPES)}",
        )
    return str(value.type)
