"""Benchmarks made of cells: each finished cell is written at once, and a second call continues where one stopped."""

import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from diffprune.runfolder import as_json, write_atomically
from export import this_machine

Cell = dict[str, Any]


def run_cells(path: Path, cells: list[Cell], measure: Callable[[Cell], Cell]) -> list[Cell]:
    """The results of all `cells`, from the file at `path` where it has them, else measured and added to it.

    A result is the cell's own settings, what `measure` returns for them, and the processor; the file has all of the
    first machine, on which it was begun. One that holds a "failure" is measured again and replaced. Several processes
    may share the file.
    """
    results = []
    for cell in cells:
        known = next((r for r in _done(path) if cell.items() <= r.items()), None)
        if known is None or "failure" in known:
            known = {**cell, **measure(cell), **processor()}
            path.parent.mkdir(parents=True, exist_ok=True)
            with alone_in(path.parent):
                others = [r for r in _done(path) if not cell.items() <= r.items()]
                first = stored(path)[0] if path.exists() else machine()
                write_atomically(path, as_json({"machine": first, "cells": [*others, known]}))
        results.append(known)
    return results


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process is inside for the same folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _done(path: Path) -> list[Cell]:
    return stored(path)[1] if path.exists() else []


def stored(path: Path) -> tuple[Cell, list[Cell]]:
    """The machine and the results of the file at `path`."""
    content = json.loads(path.read_text())
    return content["machine"], content["cells"]


def machine() -> dict[str, Any]:
    return {**this_machine().as_dict(), "torch_threads": torch.get_num_threads(), "platform": platform.system()}


def processor() -> Cell:
    """Of the cells of one file some may come from another machine."""
    here = this_machine()
    return {"cpu": ", ".join((here.cpu, *here.isa))} | ({"gpu": here.gpu} if here.gpu else {})


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float]) -> str:
    """The mean, and the sample standard deviation if there are several."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
