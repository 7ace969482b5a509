"""What can be timed, whichever runtime it comes from."""

from dataclasses import dataclass

from export.feeds import InputSpec
from export.rounds import Run


@dataclass(frozen=True)
class Candidate:
    """`run` does it once and returns when it is done, or, on a GPU, queued; `inputs` are what it is fed with."""

    run: Run
    inputs: tuple[InputSpec, ...]
    precision: str
