"""What a latency holds for, checked before anything runs."""

import operator
from dataclasses import dataclass

from export.errors import CannotMeasure

DEVICES = ("cpu", "cuda")
RUNTIMES = ("onnx", "eager", "compile", "cuda-graph")
PRECISIONS = ("fp32", "tf32", "fp16")


@dataclass(frozen=True)
class Settings:
    """`threads` compute inside an operator on the CPU; `batch` inputs at once.

    Raises:
        CannotMeasure: an unknown word, a count below 1, or what only a GPU has asked of the CPU.
    """

    device: str = "cpu"
    threads: int = 1
    batch: int = 1
    seed: int = 0
    runtime: str = "onnx"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        known("device", self.device, DEVICES)
        known("runtime", self.runtime, RUNTIMES)
        known("precision", self.precision, PRECISIONS)
        at_least_one(self.threads, f"{self.threads} threads", at="threads")
        at_least_one(self.batch, f"batch {self.batch}", at="batch")
        if not _whole(self.seed) or self.seed < 0:
            raise CannotMeasure(
                f"seed {self.seed!r} asked", at="seed", effect="nothing was run", fix="give 0 or a larger whole number"
            )
        for name in ("threads", "batch", "seed"):  # numpy's numbers as Python's: JSON knows no others
            object.__setattr__(self, name, operator.index(getattr(self, name)))
        for name, value in (("runtime", self.runtime), ("precision", self.precision)):
            if value in ("cuda-graph", "tf32") and self.device != "cuda":
                raise CannotMeasure(
                    f"{name} {value!r} asked on {self.device}", at=name, effect="nothing was run",
                    fix=f"{value} exists on a GPU only: use device='cuda', or another {name}",
                )


def known(name: str, value: str, possible: tuple[str, ...]) -> None:
    if value not in possible:
        raise CannotMeasure(
            f"{name} {value!r} is not known", at=name, effect="nothing was run",
            fix=f"use one of {', '.join(map(repr, possible))}",
        )


def at_least_one(count: int, words: str, *, at: str) -> None:
    if not _whole(count) or count < 1:
        raise CannotMeasure(
            f"{words} asked", at=at, effect="nothing was run", fix="ask for a whole number of 1 or more"
        )


def _whole(number: object) -> bool:
    """Of numpy's as well."""
    return hasattr(number, "__index__") and not isinstance(number, bool)


ONE_THREAD = Settings()
"""One input at once on the CPU, in onnxruntime."""
