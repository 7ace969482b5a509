"""What a command says last, when an error ends it."""

import errno
import re

PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""What the place where something is to be written may lack."""

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
"""All but the end of a line."""


def last_words(error: Exception) -> str | None:
    """What, where, effect and fix of an error of the three packages, or of a place that cannot be written to.

    None for all others, which are slips of ours.
    """
    if isinstance(error, OSError) and error.errno in PLACE:
        said: Exception = _no_place(error)
    # By name, as importing the three packages would mean importing torch.
    elif any(base.__name__ in ("DiffpruneError", "SurgeryError", "ExportError") for base in type(error).__mro__):
        said = error
    else:
        return None
    return spelled("\n".join([f"{type(error).__name__}: {said}", *getattr(error, "__notes__", ())]))


def spelled(text: str) -> str:
    """A file may give its layers names that would steer the terminal: control characters as Python writes them."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def _no_place(error: OSError) -> Exception:
    from diffprune.errors import DiffpruneError

    return DiffpruneError(
        str(error.strerror),
        at=str(error.filename2 or error.filename or "writing a file"),
        effect="the command stopped; what it says above is done",
        fix="make room there, or name another place",
    )
