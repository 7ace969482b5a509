"""Errors that say what, where, effect and fix."""


class DiffpruneError(Exception):
    """One line of fact, then where it was found, what it means for the caller and what to do about it."""

    def __init__(self, fact: str, *, at: str, effect: str, fix: str) -> None:
        super().__init__(f"{fact}\n  at      {at}\n  effect  {effect}\n  fix     {fix}")


class BadConfig(DiffpruneError, ValueError):
    """Settings that are unknown, out of range or contradict each other."""


class BadModel(DiffpruneError, ValueError):
    """A model name or factory that does not give a network."""


class BadWeights(DiffpruneError, ValueError):
    """Weights that are damaged, foreign, out of reach or do not fit their network."""


class BadData(DiffpruneError, ValueError):
    """Data that is missing, damaged or of the wrong shape."""


class BadBudget(DiffpruneError, ValueError):
    """A budget that means nothing, such as 0 or more than the dense network."""


class BudgetUnreachable(DiffpruneError, ValueError):
    """A budget below what is left when everything that may be cut is cut."""


class NothingToCut(DiffpruneError, ValueError):
    """A network without a single unit that may be removed."""


class GatesLost(DiffpruneError, RuntimeError):
    """A forward that reads a gated weight where its gates would get no gradient."""


class TrainingDiverged(DiffpruneError, ArithmeticError):
    """A loss that is no longer a number."""


class OutputExists(DiffpruneError, FileExistsError):
    """An output folder that already holds something."""


class DeviceMissing(DiffpruneError, RuntimeError):
    """A device that was asked for and is not there."""


class NotReproducible(DiffpruneError):
    """A file that comes out with other bytes when it is written again."""


class BadRun(DiffpruneError, ValueError):
    """A folder that is not a finished run, or whose manifest is damaged."""


class NotVerified(DiffpruneError):
    """A file or a number of a run that does not hold."""


def first_line(error: BaseException) -> str:
    """What it says in one line, at least its name."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
