"""What a run shows while it works: a bar on a terminal, plain lines elsewhere."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

TITLES = {
    "parent": "training the dense parent",
    "search": "searching",
    "recover": "recovering",
    "export": "exporting to ONNX",
    "measure": "measuring dense and pruned, interleaved",
}
LINES = 4
"""Plain lines for each training phase."""


class Progress:
    """A context manager to be called with the events of a run."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, markup=False)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        phase = event["phase"]
        if "loss" in event:
            self._step(phase, event)
        elif "accuracy" in event:
            self._console.print(f"{phase}: accuracy {100 * event['accuracy']:.2f} %")
        elif phase in TITLES:
            self._console.print(TITLES[phase])

    def _step(self, phase: str, event: dict[str, Any]) -> None:
        step, steps, status = event["step"], event["steps"], f"loss {event['loss']:.3f}"
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(TITLES[phase], total=steps, status="")
        self._bars.update(self._tasks[phase], completed=step, status=status)
        part = step * LINES // steps
        if not self._console.is_terminal and part > self._told.get(phase, 0):
            self._told[phase] = part
            self._console.print(f"{TITLES[phase]}: step {step} of {steps}, {status}")
