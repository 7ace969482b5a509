"""The folder of one run: it has its final name only when the run is finished."""

import itertools
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from diffprune.errors import BadRun, OutputExists


class RunFolder:
    """Collects files in a hidden sibling `.NAME.unfinished-XXXXXXXX`, which `finish` renames to NAME in one step.

    As a context manager it finishes when the block ends and removes everything when the block raises, but not what was
    trained by then (`keep`); an interrupt, which somebody wanted, removes that as well. A killed run leaves the hidden
    folder behind, which nothing takes for a result.
    """

    def __init__(self, final: Path, unfinished: Path) -> None:
        self._final = final
        self._unfinished = unfinished
        self._finished = self._kept = False

    @property
    def path(self) -> Path:
        """Where the files are now: the hidden folder, after `finish` the final one."""
        return self._final if self._finished else self._unfinished

    def write_text(self, name: str, text: str) -> Path:
        """Write a UTF-8 file as a whole or not at all."""
        return write_atomically(self.path / name, text)

    def write_json(self, name: str, value: Any) -> Path:
        """Write a value as JSON; numbers that are not finite become null, which every JSON reader takes."""
        return self.write_text(name, as_json(value))

    def log(self, event: dict[str, Any]) -> None:
        """Append one line of JSON to log.jsonl, at once, so that it can be followed."""
        line = json.dumps(_finite(event), ensure_ascii=False, allow_nan=False)
        with (self.path / "log.jsonl").open("a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")

    def finish(self) -> Path:
        """Give the folder its final name and return it.

        Raises:
            OutputExists: somebody else filled the output folder during the run; the results stay in the hidden folder.
        """
        if self._finished:
            return self._final
        try:
            self._unfinished.replace(self._final)  # takes the place of an empty folder, and of nothing else
        except OSError as error:
            raise OutputExists(
                f"the output folder cannot be put in place: {error.strerror}",
                at=str(self._final),
                effect=f"the finished run is complete but hidden, in {self._unfinished}",
                fix="rename the hidden folder to a free name",
            ) from error
        self._finished = True
        return self._final

    def keep(self) -> None:
        """From now on an error leaves the hidden folder, and says so: it holds what took long to train."""
        self._kept = True

    def discard(self) -> None:
        """Remove an unfinished folder; a finished one stays."""
        if not self._finished:
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif self._kept and isinstance(error, Exception) and not isinstance(error, OutputExists):
            error.add_note(f"what was trained is in {self._unfinished}")
        elif not isinstance(error, OutputExists):
            self.discard()


def create(path: str | Path) -> RunFolder:
    """A run folder that will be `path`, which must be free: absent or an empty folder.

    Raises:
        OutputExists: `path` holds something, is a file, or cannot be made.
    """
    final = _named(path)
    if not _free(final):
        raise OutputExists(
            "the output folder is taken" if os.path.isdir(final) else "the output folder is a file",
            at=str(final),
            effect="nothing was started; what is there was left alone",
            fix=f"choose another folder, for example {final / 'run' if os.path.ismount(final) else next_free(final)}",
        )
    unfinished = final.with_name(f".{final.name}.unfinished-{secrets.token_hex(4)}")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise OutputExists(
            f"the output folder cannot be made: {error.strerror}",
            at=str(final),
            effect="nothing was started",
            fix="choose a folder in which you may write",
        ) from error
    return RunFolder(final, unfinished)


def next_free(base: str | Path) -> Path:
    """The first free one of `base`, `base-2`, `base-3`, ..."""
    first = _named(base)
    numbered = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if _free(path))


def write_atomically(target: Path, text: str) -> Path:
    """Write a UTF-8 file as a whole or not at all."""
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def as_json(value: Any) -> str:
    """A value as JSON text; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _named(path: str | Path) -> Path:
    """The path itself, or for one without a last name, such as "." or "..", the absolute one."""
    return Path(path) if Path(path).name not in ("", "..") else Path(os.path.abspath(path))


def _free(path: Path) -> bool:
    # A rename cannot replace a link or a mount point, and would say so only after the whole run.
    if os.path.islink(path) or os.path.ismount(path) or not os.path.isdir(path):
        return not os.path.lexists(path)
    try:
        return next(path.iterdir(), None) is None
    except OSError:  # one that may not be looked into
        return False


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def require_files(folder: Path, names: Iterable[str]) -> None:
    """Raise BadRun unless the folder of a run has files of these names."""
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise BadRun(
            f"the folder has no {', '.join(absent)}" if folder.is_dir() else "there is no such folder",
            at=str(folder), effect="nothing was started",
            fix="give the output folder of a finished diffprune compress or demo",
        )  # fmt: skip
