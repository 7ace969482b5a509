"""What a run shows while it works: a bar on a terminal, plain lines elsewhere."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

STAGES = {
    "probe": "probing which widths are fast here",
    "table": "measuring single layers",
    "parent": "training the dense parent",
    "search": "searching",
    "recover": "recovering",
    "export": "exporting to ONNX",
    "measure": "measuring dense and pruned",
    "calibrate": "calibrating on training images",
    "validate": "answering the held-out images",
    "compare": "measuring in interleaved rounds",
}
ACCURACIES = {
    "dense": "dense network",
    "cut": "right after the cut",
    "recalibrate": "batch norm recalibrated",
    "done": "pruned network",
}
ONE_SCHEDULE = {"recover": "search"}
"""Phases that go on with the steps of another one share its bar."""

CLOCKED = ("probe", "measure", "compare")
"""Stages that measure time: nothing is redrawn meanwhile."""

LINES = 4
"""Plain lines for each schedule, beside the first of each phase."""


class Progress:
    """A context manager to be called with the events of a run; `warned` is what it has shown of warnings."""

    def __init__(self, console: Console | None = None) -> None:
        self.warned: list[str] = []
        self._console = console or Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._live,
            auto_refresh=False,  # what is measured between two events has the core to itself
        )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, int] = {}
        self._waiting: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        self._end_waiting()
        phase = event["phase"]
        if "loss" in event:
            self._step(phase, event["step"], event["steps"], f"loss {event['loss']:.3f}")
        elif "accuracy" in event:
            self._print(f"{ACCURACIES.get(phase, phase)}: accuracy {100 * event['accuracy']:.2f} %")
        elif phase == "table":
            self._step(phase, event["step"], event["steps"], "kinds of layers")
        elif phase == "correct":
            self._print(f"measured: {event['speedup']:.2f}x [{event['low']:.2f}, {event['high']:.2f}]")
        elif phase == "warning":
            self.warned.append(event["text"])
            self._print(f"warning: {event['text']}")
        elif phase in STAGES:
            self._begin_waiting(phase)

    def _step(self, phase: str, step: int, steps: int, status: str) -> None:
        title = STAGES.get(phase, phase)
        if not self._live:
            self._line(phase, step * LINES // steps, f"{title}: step {step} of {steps}, {status}")
            return
        self._bars.start()
        schedule = ONE_SCHEDULE.get(phase, phase)
        if schedule not in self._tasks:
            self._tasks[schedule] = self._bars.add_task(title, total=steps, status=status)
        self._bars.update(self._tasks[schedule], completed=step, status=status, description=title, refresh=True)

    def _line(self, phase: str, part: int, text: str) -> None:
        if part > self._told.get(phase, -1):
            self._told[phase] = part
            self._print(text)

    def _begin_waiting(self, phase: str) -> None:
        """For a stage without steps: a bar that pulses, or a line."""
        if phase in CLOCKED:
            self._bars.stop()
        if self._live and phase not in CLOCKED:
            self._bars.start()
            self._waiting = self._bars.add_task(STAGES[phase], total=None, status="")
            self._bars.refresh()
        else:
            self._print(STAGES[phase])

    def _end_waiting(self) -> None:
        if self._waiting is not None:
            self._bars.update(self._waiting, total=1, completed=1, refresh=True)
            self._waiting = None

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, emoji=False)
