"""Errors that say what, where, effect and fix."""


class ExportError(Exception):
    """One line of fact, then where it was found, what it means for the caller and what to do about it."""

    def __init__(self, fact: str, *, at: str, effect: str, fix: str) -> None:
        super().__init__(f"{fact}\n  at      {at}\n  effect  {effect}\n  fix     {fix}")


class NotExportable(ExportError, ValueError):
    """The model, its example inputs or the options cannot become a dense ONNX file."""


class NotQuantizable(ExportError, ValueError):
    """The file, its calibration examples or the target cannot become a file of int8 or float16."""


class ParityFailed(ExportError):
    """The ONNX file does not compute what the model computes, or the comparison would prove nothing."""


class BadOnnx(ExportError, ValueError):
    """A file is missing, damaged, not ONNX, not runnable here, or does not fit the other file."""


class CannotMeasure(ExportError, ValueError):
    """What was asked of a measurement is impossible: a shape that is not known, no time, no threads."""


class DeviceMissing(ExportError, RuntimeError):
    """The device asked for is not there. Nothing else is measured in its place."""


def one_line(error: BaseException) -> str:
    """All that it says, in one line."""
    return " ".join(str(error).split())
