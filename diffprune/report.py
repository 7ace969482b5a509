"""The numbers of a run for people: a page of HTML and a table for the terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table

from diffprune.progress import STAGES
from diffprune.tables import add_row, table

POINTS = 300  # more than this cannot be told apart in the curve
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 300, 52, 52, 26, 40  # of the curve, in its own units


@dataclass(frozen=True)
class Row:
    """One line of the table, as text."""

    name: str
    dense: str
    pruned: str
    ratio: str
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line of the curve as an SVG path; `name` is loss, macs or accuracy."""

    name: str
    path: str


@dataclass(frozen=True)
class Phase:
    """The stretch of one phase along the horizontal axis of the curve."""

    name: str
    title: str
    left: float
    width: float


@dataclass(frozen=True)
class Tick:
    """A label at a place along an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """Everything the template draws of the training curve."""

    lines: tuple[Line, ...]
    phases: tuple[Phase, ...]
    losses: tuple[Tick, ...]
    shares: tuple[Tick, ...]
    steps: tuple[Tick, ...]


def rows(report: Mapping[str, Any]) -> tuple[Row, ...]:
    """The table: parameters, MACs, file size, accuracy and, for each device, latency."""
    sized = (("Parameters", "params", count), ("MACs", "macs", count), ("File size", "file_bytes", size))
    sizes = [
        Row(name, form(report[key]["dense"]), form(report[key]["pruned"]), _share(report[key]))
        for name, key, form in sized
    ]
    budget, accuracy = report["budget"], report["accuracy"]
    if budget["reopened"]:
        sizes[1] = replace(sizes[1], note=f"{count(budget['reopened'])} units kept: steps of {budget['round_to']}")
    points = 100 * (accuracy["pruned"] - accuracy["dense"])
    examples = f"{count(accuracy['examples'])} held-out examples"
    change = f"{points:+.2f} points".replace("-", "\N{MINUS SIGN}")
    found = [*sizes, Row("Accuracy", percent(accuracy["dense"]), percent(accuracy["pruned"]), change, examples)]
    for device, latency in report["latency"].items():
        speedup = f"{times(latency['speedup'])} [{latency['low']:.2f}, {latency['high']:.2f}]"
        threads = f"{latency['threads']} thread{'' if latency['threads'] == 1 else 's'}, batch {latency['batch']}"
        medians = milliseconds(latency["dense_ms"]), milliseconds(latency["pruned_ms"])
        found.append(Row(f"Latency, {device}", *medians, speedup, f"{threads}; {latency['verdict']}"))
    return tuple(found)


def summary_table(report: Mapping[str, Any]) -> Table:
    """The table for a terminal, as rich draws it."""
    drawn = table("", "dense", "pruned", "ratio", "", right=range(1, 4))
    for row in rows(report):
        add_row(drawn, row.name, row.dense, row.pruned, row.ratio, row.note)
    return drawn


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of the run and of its latencies, each once."""
    latencies = (text for latency in report["latency"].values() for text in latency["warnings"])
    return list(dict.fromkeys([*report["warnings"], *latencies]))


def templates(*, escape: bool) -> Environment:
    """What reads the templates of the package; a name that is not given is an error, never empty."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(report: Mapping[str, Any]) -> str:
    """One self-contained page of HTML without scripts; every text in the report is escaped."""
    environment = templates(escape=True)
    environment.filters |= {"count": count, "percent": percent, "tiny": tiny, "words": words}
    sides = {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM}
    return environment.get_template("report.html").render(
        report=report,
        rows=rows(report),
        curve=curve(report["curve"]),
        frame={"width": WIDTH, "height": HEIGHT, **sides},
        warnings=warnings(report),
        shown=times if report["budget"]["kind"] == "speedup" else percent,
    )


# Numbers as text


def count(value: float) -> str:
    """1234567 as 1 234 567, with spaces that do not break."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def size(value: float) -> str:
    """Bytes, in the largest unit that leaves a number of at least 1."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((f"{value / unit:.2f} {name}" for name, unit in units if value >= unit), f"{value:.0f} B")


def percent(value: float) -> str:
    """A share in [0, 1]."""
    return f"{100 * value:.2f} %"


def times(value: float) -> str:
    """A speed-up."""
    return f"{value:.2f}\N{MULTIPLICATION SIGN}"


def figures(value: float) -> str:
    """Three significant digits, and more only before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def milliseconds(value: float) -> str:
    return f"{figures(value)} ms"


def tiny(value: float | None) -> str:
    """A relative error."""
    return "not measured" if value is None else f"{value:.1e}"


def words(value: Any) -> str:
    """Any JSON value as words: {"a": [1, 2]} as "a 1, 2"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(entry)}" for key, entry in value.items())
    return ", ".join(map(words, value)) if isinstance(value, list | tuple) else str(value)


def _share(pair: Mapping[str, float]) -> str:
    return percent(pair["pruned"] / pair["dense"]) if pair["dense"] else "\N{EN DASH}"


# The training curve


def curve(points: Sequence[Mapping[str, Any]]) -> Curve | None:
    """The drawing of the points of a curve; None when nothing was trained."""
    stretches = _thinned(points)
    if not stretches:
        return None
    last = max(1.0, stretches[-1][1][-1]["step"])
    top = max((point["loss"] for _, part in stretches for point in part if "loss" in point), default=0.0) or 1.0

    def across(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / last, 1)

    def up(share: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    lines, phases, begin = [], [], 0.0
    for name, part in stretches:
        end = part[-1]["step"]
        phases.append(Phase(name, STAGES.get(name, name), across(begin), across(end) - across(begin)))
        begin = end
        for key, scale in (("loss", top), ("macs", 1.0), ("accuracy", 1.0)):
            places = [f"{across(point['step'])},{up(point[key] / scale)}" for point in part if key in point]
            if places:
                lines.append(Line(key, "M" + "L".join(places) + ("h0.1" if len(places) == 1 else "")))
    return Curve(
        lines=tuple(lines),
        phases=tuple(phases),
        losses=tuple(Tick(up(value / top), f"{value:g}") for value in _round_values(top)),
        shares=tuple(Tick(up(value / 4), f"{25 * value} %") for value in range(5)),
        steps=tuple(Tick(across(value), count(value)) for value in _round_values(last)),
    )


def _thinned(points: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, float]]]]:
    """The phases in order, each as its part of POINTS means or fewer; steps that start anew are put end to end."""
    stretches: list[tuple[str, list[dict[str, float]]]] = []
    offset = previous = 0.0
    for point in points:
        offset, previous = offset + (previous if point["step"] < previous else 0.0), point["step"]
        if not stretches or stretches[-1][0] != point["phase"]:
            stretches.append((point["phase"], []))
        values = {key: point.get(key) for key in ("loss", "macs", "accuracy")}
        finite = {key: float(value) for key, value in values.items() if value is not None and math.isfinite(value)}
        stretches[-1][1].append({"step": offset + point["step"], **finite})
    width = math.ceil(len(points) / POINTS)
    return [(name, [_mean(part[at : at + width]) for at in range(0, len(part), width)]) for name, part in stretches]


def _mean(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each value over the points that have it, at the last one's step."""
    keys = dict.fromkeys(key for point in points for key in point)
    values = {key: [point[key] for point in points if key in point] for key in keys}
    return {key: sum(found) / len(found) for key, found in values.items()} | {"step": points[-1]["step"]}


def _round_values(top: float) -> list[float]:
    """0 and the multiples of 1, 2 or 5 times a power of ten up to `top`: three to six of them."""
    unit = 10.0 ** math.floor(math.log10(top))
    step = next(factor * unit for factor in (0.2, 0.5, 1.0, 2.0) if top / (factor * unit) < 6)
    return [index * step for index in range(int(top / step) + 1)]
