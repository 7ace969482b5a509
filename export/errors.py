"""Errors that say what, where, effect and fix."""


class ExportError(Exception):
    """One line of fact, then where it was found, what it means for the caller and what to do about it."""

    def __init__(self, fact: str, *, at: str, effect: str, fix: str) -> None:
        super().__init__(f"{fact}\n  at      {at}\n  effect  {effect}\n  fix     {fix}")

