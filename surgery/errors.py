"""Errors that say what, where, effect and fix."""


class SurgeryError(Exception):
    """One line of fact, then where it was found, what it means for the caller and what to do about it."""

    def __init__(self, fact: str, *, at: str, effect: str, fix: str) -> None:
        super().__init__(f"{fact}\n  at      {at}\n  effect  {effect}\n  fix     {fix}")


class CaptureFailed(SurgeryError):
    """The network could not be turned into a graph of operators."""


class NotFollowed(SurgeryError, RuntimeError):
    """A network of which no cut could be proven exact."""


class FinderFailed(SurgeryError, RuntimeError):
    """The second finder raised, did not end, or found groups that cannot be cut exactly."""


class NotCopied(SurgeryError, TypeError):
    """A network that does not support copy.deepcopy."""


class BadKeep(SurgeryError, ValueError):
    """A keep that does not fit its graph, or would empty a width."""


class NotCarried(SurgeryError, ValueError):
    """An optimizer that cannot go on with a network."""


class NotEqual(SurgeryError, ArithmeticError):
    """Two networks that must compute the same do not."""


class BadFile(SurgeryError, ValueError):
    """A stored network that is damaged, foreign or does not fit the factory."""


def first_line(error: BaseException) -> str:
    """What it says in one line, at least its name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
