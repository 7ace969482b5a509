"""The user's own code, by its name."""

import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffprune.errors import DiffpruneError, first_line


def imported(spec: str, error: type[DiffpruneError]) -> Callable[..., Any]:
    """The callable behind `package.module:name`. This runs the user's code: importing a module executes it.

    The current folder joins the import path, in front, as with `python -m`, and stays on it for later imports.

    Raises:
        error: the module cannot be imported, or has no such callable.
    """
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as cause:
        if cause.name is None or not f"{module_name}.".startswith(f"{cause.name}."):
            raise _failed(spec, error, f"importing {module_name} failed: {cause}") from cause
        raise error(
            f"there is no module {module_name}",
            at=spec,
            effect="nothing was run",
            fix="check the name, and run from the folder that holds the module or install it",
        ) from cause
    except (Exception, SystemExit) as cause:
        raise _failed(
            spec, error, f"importing {module_name} failed: {type(cause).__name__}: {first_line(cause)}"
        ) from cause
    found: object = getattr(target, name, None)
    if not callable(found):
        fact, fix = f"module {module_name} has no {name}", "name a function or class after the colon"
        nearest = difflib.get_close_matches(name, vars(target), n=1)
        if hasattr(target, name):
            fact = f"{module_name}.{name} is {type(found).__name__}, not a function"
        elif nearest:
            fix = f"did you mean {module_name}:{nearest[0]}?"
        raise error(fact, at=spec, effect="nothing was run beyond the import", fix=fix)
    return found


def called(spec: str, function: Callable[..., Any], error: type[DiffpruneError], **arguments: Any) -> Any:
    """What the user's function returns; whatever it raises becomes `error`, with the cause chained."""
    try:
        return function(**arguments)
    except (Exception, SystemExit) as cause:
        raise _failed(spec, error, f"calling it raised {type(cause).__name__}: {first_line(cause)}") from cause


def _failed(spec: str, error: type[DiffpruneError], fact: str) -> DiffpruneError:
    return error(fact, at=spec, effect="nothing was started", fix="run it in Python: the traceback shows the line")
