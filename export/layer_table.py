"""The latency of single layers at several widths, measured on the target and remembered."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from export.errors import CannotMeasure
from export.layer_kinds import LayerKind, Widths
from export.layer_networks import in_torch
from export.layers import RUNS, in_files
from export.machine import cpu_kind, this_machine
from export.settings import ONE_THREAD, Settings


def layer_table(
    wanted: Mapping[LayerKind, Sequence[Widths]],
    settings: Settings = ONE_THREAD,
    *,
    folder: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[tuple[LayerKind, Widths], float]:
    """Milliseconds of each layer wanted, the fastest of some runs: of onnxruntime's profile, or in torch.

    What was measured before under the same conditions (CPU or GPU, version of the runtime and the options) is read from
    `folder`, by default `cache_folder()`, where it is added kind by kind: a table that was interrupted goes on.

    Raises:
        CannotMeasure: the runtime does not run a layer, or tells no times of single ones.
        DeviceMissing: no such device here.
    """
    if settings.runtime == "onnx" and (settings.device, settings.precision) != ("cpu", "fp32"):
        raise CannotMeasure(
            f"single layers were asked of onnxruntime on {settings.device} in {settings.precision}", at="settings",
            effect="nothing was measured", fix="on a GPU, or in fp16, ask torch: runtime='cuda-graph' or 'eager'",
        )
    measured = in_files if settings.runtime == "onnx" else in_torch
    file = (folder or cache_folder()) / f"layers-{_target(settings)}.json"
    known = _read(file)
    for done, (kind, pairs) in enumerate(wanted.items()):
        on_progress(done, len(wanted))
        missing = [widths for widths in dict.fromkeys(pairs) if kind.entry(widths) not in known]
        for found in measured(kind, missing, settings):
            known |= {kind.entry(widths): ms for widths, ms in found.items()}
            _write(file, _read(file) | known)
    on_progress(len(wanted), len(wanted))
    return {(kind, widths): known[kind.entry(widths)] for kind, pairs in wanted.items() for widths in pairs}


def cache_folder() -> Path:
    """Where measurements are remembered: $XDG_CACHE_HOME/diffprune, or ~/.cache/diffprune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffprune"


def _target(settings: Settings) -> str:
    """Names what a measurement holds for: CPU or GPU, runtime, threads, batch, precision."""
    machine = this_machine()
    kind: tuple[object, ...] = machine.cpu, *cpu_kind(), machine.isa, machine.onnxruntime
    if settings.runtime != "onnx":
        kind = *kind, settings.runtime, machine.torch
    if settings.device == "cuda":
        kind = *kind, machine.gpu, torch.version.cuda
    text = json.dumps([*kind, settings.threads, settings.batch, settings.precision, RUNS])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, float]:
    """What is remembered; nothing if the file is not there or is no longer whole."""
    try:
        return {str(entry): float(ms) for entry, ms in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(file: Path, known: Mapping[str, float]) -> None:
    """Remember what can be remembered: without a folder to write into, a measurement counts all the same."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(known, indent=0))
        draft.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
