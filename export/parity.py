"""Does the file compute what the network computes? The gate every export passes."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.distance import Array, worst
from export.errors import BadOnnx, ParityFailed, one_line
from export.preprocessing import LEVELS, Preprocessing
from export.sessions import open_session
from export.tensors import Examples, example_tuple, outputs_of, repeat_to, resting_copy

# One, two (what the export was traced with) and an odd one: a batch size baked into the graph fails one of them.
BATCHES = (1, 2, 5)
# Typical for float32 is 1e-6; a wrong padding or a forgotten layer is above 1e-2.
TOLERANCE = 1e-4
# An output that hardly depends on the input passes any tolerance, even from a file that always answers the same. So
# what the input changes in the output has to be this many times larger than the difference of file and network.
FOLLOWS = 10


@dataclass(frozen=True)
class BatchParity:
    """The file against the network at one batch size, the worst of all outputs.

    `max_abs` is max |d|, `relative` is max |d| / max |reference|, `top1_agreement` the share of positions with the same
    largest channel (ties within the tolerance agree), `sqnr_db` the signal to noise ratio, infinite when bits agree.
    """

    batch: int
    max_abs: float
    relative: float
    top1_agreement: float
    sqnr_db: float


@dataclass(frozen=True)
class Parity:
    """One row per batch size (for a file with a fixed one, per draw), all of them within `tolerance`."""

    batches: tuple[BatchParity, ...]
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest relative error of all batch sizes."""
        return max(row.relative for row in self.batches)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no infinity: an infinite `sqnr_db` becomes None."""
        rows = [asdict(row) for row in self.batches]
        for row in rows:
            row["sqnr_db"] = row["sqnr_db"] if math.isfinite(row["sqnr_db"]) else None
        return {"worst": self.worst, "tolerance": self.tolerance, "batches": rows}


def check_parity(
    path: str | Path,
    model: nn.Module,
    example_inputs: Examples,
    *,
    preprocessing: Preprocessing | None = None,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Run file and network on the same random inputs at several batch sizes; return how far apart they are.

    Floating-point inputs are standard normal with a fixed seed; uint8 ones are pixels, drawn from 0 to 255 (ONNX has no
    use for them as indices); other integers and booleans repeat the example's values, since only the caller knows which
    of them are valid. A file with `preprocessing` inside is compared with preprocessing and network, one with a fixed
    batch at that batch, on as many draws. The error is relative to the largest reference: an absolute one fails large
    logits and passes small ones.

    Raises:
        ParityFailed: apart by more than `tolerance`; not finite; or an output that depends on the input by less than
            FOLLOWS times that distance, which even a file with a constant output could pass.
        BadOnnx: the file does not load or has other inputs or outputs than the network.
        NotExportable: the network does not run on inputs like these.
    """
    resting, examples = resting_copy(model), example_tuple(example_inputs)
    if preprocessing is not None:
        resting, examples = preprocessing.before(resting, examples)
    return parity_of(Path(path), resting, examples, tolerance=tolerance)


def parity_of(path: Path, resting: nn.Module, examples: tuple[Tensor, ...], *, tolerance: float) -> Parity:
    """`check_parity` for a network that is already on the CPU and in eval mode."""
    session = open_session(path)
    names = _names_fitting(session, examples, path)
    fixed = session.get_inputs()[0].shape[0]
    rows, answers, references = [], [], []
    # A single sample could not show whether the output follows the input: hence the draws at a fixed batch of one.
    for draw, batch in enumerate([fixed] * len(BATCHES) if isinstance(fixed, int) else BATCHES):
        inputs = tuple(_random_like(example, batch, 100 * draw + at) for at, example in enumerate(examples))
        reference = [output.numpy() for output in outputs_of(resting, inputs)]
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        found = _run(session, feed, path)
        _refuse_not_finite(reference, path)
        rows.append(_compare(found, reference, batch, tolerance, path))
        answers.append(found)
        references.append(reference)
    parity = Parity(tuple(rows), tolerance)
    for row in rows:
        if not row.relative <= tolerance:  # written so that a NaN is refused as well
            raise ParityFailed(
                f"the file is wrong by {row.relative:.3g} of the largest output; allowed is {tolerance:g}",
                at=f"{path.name} at batch {row.batch}: max |d| {row.max_abs:.3g}, "
                f"top-1 agreement {row.top1_agreement:.0%}, SQNR {row.sqnr_db:.1f} dB",
                effect="the file does not compute what the network computes",
                fix="do not use the file; look for randomness, state, or a fixed batch in forward()",
            )
    _refuse_constant(answers, references, rows, [_drawn(example) for example in examples], path)
    return parity


def _drawn(example: Tensor) -> bool:
    """Whether every value of this dtype is valid, so that inputs can be drawn."""
    return example.is_floating_point() or example.dtype == torch.uint8


def _random_like(example: Tensor, batch: int, seed: int) -> Tensor:
    if not _drawn(example):
        return repeat_to(example, batch)
    generator, shape = torch.Generator().manual_seed(1000 * batch + seed), (batch, *example.shape[1:])
    if example.dtype == torch.uint8:
        return torch.randint(LEVELS + 1, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator).to(example.dtype)


def _names_fitting(session: Any, examples: tuple[Tensor, ...], path: Path) -> list[str]:
    """The names of the file's inputs, after checking that the examples fit them."""
    found = [f"({', '.join(map(str, value.shape[1:]))})" for value in session.get_inputs()]
    wanted = [f"({', '.join(map(str, example.shape[1:]))})" for example in examples]
    if found != wanted:
        raise BadOnnx(
            f"the file takes inputs {found} behind the batch axis, the example inputs have {wanted}", at=str(path),
            effect="nothing was compared", fix="pass example inputs like those of the export",
        )
    return [value.name for value in session.get_inputs()]


def _run(session: Any, feed: dict[str, Array], path: Path) -> list[Array]:
    try:
        return list(session.run(None, feed))
    except Exception as error:
        shapes = ", ".join(f"{name} {array.shape} {array.dtype}" for name, array in feed.items())
        raise BadOnnx(
            f"onnxruntime cannot run the file: {one_line(error)}", at=f"{path.name} with {shapes}",
            effect="nothing was compared", fix="do not fix the batch size in forward(); use float32",
        ) from error


def _compare(found: list[Array], reference: list[Array], batch: int, tolerance: float, path: Path) -> BatchParity:
    shapes = [array.shape for array in found], [array.shape for array in reference]
    if shapes[0] != shapes[1]:
        raise BadOnnx(
            f"the file returns shapes {shapes[0]}, the network {shapes[1]}", at=f"{path.name} at batch {batch}",
            effect="nothing was compared", fix="do not fix the batch size in forward()",
        )
    return BatchParity(batch, *worst(found, reference, tolerance))


def _refuse_not_finite(reference: list[Array], path: Path) -> None:
    for position, output in enumerate(reference):
        if not np.isfinite(output).all():
            raise ParityFailed(
                "the network itself returns NaN or infinity", at=f"{path.name}, output {position}, random inputs",
                effect="the file cannot be compared with it",
                fix="repair the weights; a network that needs inputs of a certain range should scale them itself",
            )


def _refuse_constant(
    answers: list[list[Array]], references: list[list[Array]], rows: list[BatchParity], drawn: list[bool], path: Path
) -> None:
    """Refuse outputs, per sample and of floating point, whose dependence on the input the file could have missed.

    All others, such as anchors or a learned temperature, are constant by nature and compared as such. Inputs that are
    not `drawn` are copies of each other in all samples: of an output that may follow these alone, only one that is one
    number throughout is refused.
    """
    batches = [row.batch for row in rows]
    outputs = zip(zip(*answers, strict=True), zip(*references, strict=True), strict=True)
    for position, (found, wanted) in enumerate(outputs):
        if not np.issubdtype(wanted[0].dtype, np.floating) or not _per_sample(wanted, batches):
            continue
        samples = _samples(wanted, batches)
        if not samples.size:
            continue
        apart = np.abs(_samples(found, batches) - samples).max()
        spread = np.ptp(samples, axis=0).max() if any(drawn) else 0.0
        if not (spread or all(drawn)):
            spread = np.ptp(samples)
        rounding = np.finfo(wanted[0].dtype).eps * np.abs(samples).max()
        if not spread > max(FOLLOWS * apart, rounding):
            raise ParityFailed(
                f"the network's output is constant, or nearly so: with the input it varies by {spread:.3g}, "
                f"its largest value is {np.abs(samples).max():.3g}, file and network are {apart:.3g} apart",
                at=f"{path.name}, output {position}, random inputs",
                effect="the comparison proves nothing: a file with a constant output would pass",
                fix="train the network or load weights; some classification heads are initialised with zeros",
            )


def _per_sample(outputs: tuple[Array, ...], batches: list[int]) -> bool:
    """Whether one output has as much for every sample, at each of these batch sizes: k rows of one shape.

    At a batch size that is fixed k is one: anchors have any number of rows.
    """
    if len({output.shape[1:] for output in outputs}) > 1 or not outputs[0].ndim:
        return False
    shares = {len(output) / batch for output, batch in zip(outputs, batches, strict=True)}
    return len(shares) == 1 and (len(set(batches)) > 1 or shares == {1})


def _samples(outputs: tuple[Array, ...], batches: list[int]) -> Array:
    """One output at all batch sizes, each (k * batch, ...), as (samples, values)."""
    parts = [output.reshape(batch, -1) for output, batch in zip(outputs, batches, strict=True)]
    return np.concatenate(parts).astype(np.float64)
