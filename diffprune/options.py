"""Options of the command line that are more than a word, read or refused; without torch, so that help comes at once."""

import os
from pathlib import Path

from diffprune.errors import BadConfig


def _integers(text: str) -> tuple[int, ...]:
    """8,224,224 as numbers; none for anything else."""
    parts = text.split(",")
    return tuple(map(int, parts)) if all(part.strip().isdecimal() for part in parts) else ()


def image_shape(text: str | None, model: str) -> tuple[int, ...]:
    """Channels, height and width from the option, or what fits the network's family."""
    if text is None:
        return (1, 16, 16) if model.startswith("digits:") else (3, 224, 224)
    sizes = _integers(text)
    if len(sizes) != 3 or 0 in sizes:
        raise bad_option(f"--input is {text!r}", "write channels,height,width, such as 3,224,224")
    return sizes


def counts(text: str, option: str) -> list[int]:
    found = _integers(text)
    if not found:
        raise bad_option(f"{option} is {text!r}", "write a number or several, such as 1,8")
    return [*found]


def named_sizes(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    found = _integers(sizes)
    if not name or not found:
        raise bad_option(f"--input is {text!r}", "write NAME=3,224,224: a name of the file, its sizes but the batch")
    return name, found


def numbers(text: str | None, option: str) -> tuple[float, ...]:
    try:
        return () if text is None else tuple(map(float, text.split(",")))
    except ValueError:
        raise bad_option(f"{option} is {text!r}", "write a number per channel, such as 0.485,0.456,0.406") from None


def lines_of(file: Path, option: str) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would split names at U+2028 as well
        return tuple(lines[:-1] if not lines[-1] else lines)
    except (OSError, UnicodeDecodeError) as error:
        raise bad_option(f"{option} {file} cannot be read: {error}", "name a text file, a name on each line") from None


def multiple(text: str) -> int:
    if text == "auto":
        from export import default_step

        return default_step()
    if not text.isdecimal() or not int(text):
        raise bad_option(f"--round-to is {text!r}", "give a number, 1 or more, or auto")
    return int(text)


def require_folder(file: Path, option: str) -> None:
    """Before any work: a file can be written there."""
    if os.path.isdir(file) or not os.access(file.parent, os.W_OK | os.X_OK):
        fact = "is a folder" if os.path.isdir(file) else "is in a folder that does not exist or cannot be written to"
        raise bad_option(f"{option} {file} {fact}", "name a file in a folder that exists and is yours")


def bad_option(fact: str, fix: str) -> Exception:
    return BadConfig(fact, at="the command line", effect="nothing was started", fix=fix)
