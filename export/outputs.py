"""What a file answers, and how far that is from what another one answers to the same inputs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.distance import Array, worst
from export.errors import BadOnnx, one_line
from export.sessions import open_session


@dataclass(frozen=True)
class Fidelity:
    """How well one file stands for another on `examples` inputs, the worst of all outputs.

    `sqnr_db` is the signal to quantization noise ratio, 10 log10(sum reference^2 / sum (found - reference)^2) in dB,
    infinite when the bits agree; `top1_agreement` the share of positions with the same largest channel, ties included;
    `relative` max |found - reference| / max |reference|.
    """

    examples: int
    top1_agreement: float
    sqnr_db: float
    relative: float


def answers(path: str | Path, batches: Iterable[Array], *, threads: int = 1) -> tuple[Array, ...]:
    """Every output of the file for batches of its only input, each (examples, ...).

    Raises:
        BadOnnx: the file is missing, damaged, takes several inputs, or does not run on a batch; or there is none.
    """
    (found,) = answers_of([path], batches, threads=threads)
    return found


def answers_of(
    paths: Sequence[str | Path], batches: Iterable[Array], *, threads: int = 1
) -> list[tuple[Array, ...]]:
    """The `answers` of several files to the same batches, which are gone through once. Raises as `answers`."""
    sessions = [(path, open_session(path, threads=threads)) for path in paths]
    names = [_only_input(session, path) for path, session in sessions]
    found: list[list[Sequence[Array]]] = [[] for _ in paths]
    for batch in batches:
        for (path, session), name, own in zip(sessions, names, found, strict=True):
            try:
                own.append(session.run(None, {name: batch}))
            except Exception as error:
                fact = f"onnxruntime cannot run the file on {batch.shape} {batch.dtype}: {one_line(error)}"
                raise _bad(fact, path, "give images like those the file was exported with") from error
    if not all(found):
        raise _bad("there is nothing to answer", paths[0], "give at least one batch")
    return [tuple(np.concatenate([*map(np.atleast_1d, parts)]) for parts in zip(*own, strict=True)) for own in found]


def _only_input(session: Any, path: str | Path) -> str:
    names = [str(value.name) for value in session.get_inputs()]
    if len(names) != 1:
        raise _bad(f"the file takes {len(names)} inputs", path, "give a file with one input, the images")
    return names[0]


def fidelity(found: Sequence[Array], reference: Sequence[Array]) -> Fidelity:
    """`answers` of a file against those of the one it stands for.

    Raises:
        BadOnnx: they differ in number or shape.
    """
    shapes = [[output.shape for output in outputs] for outputs in (found, reference)]
    if shapes[0] != shapes[1]:
        raise _bad(f"the outputs are {shapes[0]} and {shapes[1]}", "the two files", "compare files of one network")
    _, relative, agreement, sqnr = worst(found, reference, tolerance=0)
    return Fidelity(len(reference[0]), agreement, sqnr, relative)


def _bad(fact: str, at: object, fix: str) -> BadOnnx:
    return BadOnnx(fact, at=str(at), effect="nothing was compared", fix=fix)
