"""What is seen of a run: a bar on a terminal, plain lines elsewhere."""

import io
from typing import Any

import pytest
from rich.console import Console

from diffprune.progress import LINES, Progress

STEPS = 40
EVENTS: list[dict[str, Any]] = [
    {"phase": "probe"},
    *({"phase": "parent", "step": step + 1, "steps": STEPS, "loss": 2.0} for step in range(STEPS)),
    {"phase": "dense", "accuracy": 0.98765},
    {"phase": "warning", "text": "[bold]mind[/bold] :factory:"},
    *({"phase": "search", "step": step + 1, "steps": STEPS, "loss": 1.0, "macs": 0.5} for step in range(6)),
    {"phase": "cut", "accuracy": 0.5},
    *({"phase": "recover", "step": step + 1, "steps": STEPS, "loss": 0.25} for step in range(6, STEPS)),
    {"phase": "done", "accuracy": 0.9},
    {"phase": "export"},
    {"phase": "measure"},
    {"phase": "finished"},
]


def shown(*, terminal: bool, term: str = "xterm") -> tuple[str, Progress]:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=terminal, width=80, _environ={"TERM": term}, markup=False, emoji=False, no_color=True
    )
    with Progress(console) as progress:
        for event in EVENTS:
            progress(event)
    return out.getvalue(), progress


def test_plain_lines_where_there_is_no_terminal() -> None:
    text, _ = shown(terminal=False)
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert "dense network: accuracy 98.77 %" in lines
    assert "exporting to ONNX" in lines
    assert "searching: step 1 of 40, loss 1.000" in lines
    assert "recovering: step 40 of 40, loss 0.250" in lines
    assert len(lines) < STEPS, "not a line for every step"
    assert sum("training the dense parent" in line for line in lines) == LINES + 1


def test_a_bar_on_a_terminal() -> None:
    text, progress = shown(terminal=True)
    assert "\x1b[" in text, "the bar is redrawn in place"
    assert "━" in text
    assert "right after the cut: accuracy 50.00 %" in text
    assert "step 1 of" not in text, "no plain lines beside the bar"
    for task in progress._bars.tasks:
        assert task.finished, task.description
    assert len(progress._bars.tasks) == 3, "search and recovery share one schedule and one bar"


def test_a_terminal_that_cannot_redraw_gets_lines() -> None:
    text, _ = shown(terminal=True, term="dumb")
    assert "recovering: step 40 of 40" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_text_is_shown_as_it_is(terminal: bool) -> None:
    text, progress = shown(terminal=terminal)
    assert "warning: [bold]mind[/bold] :factory:" in text
    assert progress.warned == ["[bold]mind[/bold] :factory:"]


def test_the_cursor_comes_back_when_a_run_fails() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm"})

    def fail() -> None:
        with Progress(console) as progress:
            progress(EVENTS[1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_a_phase_of_another_version_is_no_crash() -> None:
    with Progress(Console(file=io.StringIO(), force_terminal=True)) as progress:
        progress({"phase": "later", "step": 1, "steps": 2, "loss": 1.0})
        progress({"phase": "later still", "accuracy": 1.0})
        progress({"phase": "last"})


def test_nothing_is_redrawn_while_time_is_measured() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    with Progress(console) as progress:
        for phase in ("probe", "measure"):
            progress(EVENTS[1])
            assert progress._bars.live.is_started
            progress({"phase": phase})
            assert not progress._bars.live.is_started
    assert "measuring dense and pruned" in out.getvalue()
