"""`diffprune bench`: one ONNX file measured, or two networks compared, under each of several settings."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import export
from diffprune.errors import BadConfig
from diffprune.stored import load_run
from export.feeds import Shapes
from export.settings import Settings

Result = export.Latency | export.Comparison


@dataclass(frozen=True)
class Bench:
    """`names` of what was measured, one or two, and a result for each setting; `failure` is why some are missing."""

    names: tuple[str, ...]
    settings: tuple[Settings, ...]
    results: tuple[Result, ...]
    failure: export.ExportError | None = None

    def as_dict(self) -> dict[str, Any]:
        """A single result as it is, several in a list under "results"; with the "failure" that kept others away."""
        found = [result.as_dict() for result in self.results]
        failure = {"failure": str(self.failure)} if self.failure else {}
        return (found[0] if len(found) == 1 else {"results": found}) | failure


def grid(
    device: str, *, threads: list[int], batches: list[int], runtimes: list[str], precisions: list[str]
) -> tuple[Settings, ...]:
    """Every combination once, all of them possible. Raises CannotMeasure."""
    combinations = dict.fromkeys(itertools.product(threads, batches, runtimes, precisions))
    return tuple(Settings(device, count, batch, 0, *words) for count, batch, *words in combinations)


def bench(
    dense: Path,
    small: Path | None,
    settings: Sequence[Settings],
    *,
    shapes: Shapes,
    seconds: float,
    tell: Callable[[str], None],
) -> Bench:
    """Measure a file, compare two, or compare both networks of a run, whose folder `dense` is then.

    Raises BadConfig for a file in a runtime of torch, and the errors of `load_run` and of what measures in `export`; of
    a later setting, these end it with the results so far.
    """
    in_torch = any(setting.runtime != "onnx" for setting in settings)
    _require_sensible(dense, small, shapes, in_torch=in_torch)
    stored = load_run(dense) if in_torch else None
    files = (dense / "dense.onnx", dense / "pruned.onnx") if dense.is_dir() else (dense, small) if small else (dense,)
    names = ("dense", "pruned") if dense.is_dir() else tuple(map(str, files))

    def measured(setting: Settings) -> Result:
        options: dict[str, Any] = {**asdict(setting), "seconds": seconds}
        if stored and setting.runtime != "onnx":
            return export.compare_networks(stored.dense, stored.pruned, stored.example, **options)
        del options["runtime"]
        return (export.compare if len(files) == 2 else export.measure)(*files, shapes=shapes, **options)

    results: list[Result] = []
    for number, setting in enumerate(settings, 1):
        if len(settings) > 1:
            tell(f"measuring {number} of {len(settings)}: {in_words(asdict(setting))}")
        try:
            results.append(measured(setting))
        except export.ExportError as failure:
            if not results:
                raise
            return Bench(names, tuple(settings[: len(results)]), tuple(results), failure)
    return Bench(names, tuple(settings), tuple(results))


def in_words(setting: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def _require_sensible(dense: Path, small: Path | None, shapes: Shapes, *, in_torch: bool) -> None:
    fact = None
    if small and (dense.is_dir() or small.is_dir()):
        fact, fix = "a run's folder is compared by itself: it holds both networks", "name one folder, or two ONNX files"
    elif in_torch and not dense.is_dir():
        fact, fix = "torch does not run ONNX files", "name the folder of a run, or use --runtime onnx"
    elif in_torch and shapes:
        fact, fix = "--input is for ONNX files; a run knows its images", "leave it out, or use --runtime onnx"
    if fact:
        raise BadConfig(fact, at="the command line", effect="nothing was measured", fix=fix)
