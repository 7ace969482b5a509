"""The report: every number is on the page, every hostile text is only text, and the drawing is sound."""

import copy
import io
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from diffprune.report import (
    HEIGHT,
    POINTS,
    WIDTH,
    count,
    curve,
    figures,
    milliseconds,
    render,
    rows,
    size,
    summary_table,
)

REPORT: dict[str, Any] = {
    "model": "digits:resnet18",
    "data": "digits",
    "version": "0.1.7",
    "seed": 41,
    "seconds": 93.14,
    "verdict": "2.31 times as fast.",
    "accuracy": {
        "dense": 0.98667,
        "after_cut": 0.4123,
        "after_recalibration": 0.9512,
        "pruned": 0.9844,
        "examples": 450,
    },
    "macs": {"dense": 142_336_000, "pruned": 70_740_992},
    "params": {"dense": 11_172_810, "pruned": 3_456_789},
    "file_bytes": {"dense": 44_712_345, "pruned": 13_876_543},
    "latency": {
        "cpu": {
            "dense_ms": 5.4321,
            "pruned_ms": 2.3456,
            "speedup": 2.316,
            "low": 2.21,
            "high": 2.43,
            "threads": 3,
            "batch": 16,
            "verdict": "faster",
            "warnings": ["the clock moved"],
        }
    },
    "equivalence": {"masked_vs_cut": 1.23e-7, "cut_vs_onnx": 4.56e-7},
    "budget": {
        "kind": "macs",
        "asked": 0.5,
        "reached": 0.4971,
        "note": "it says why",
        "round_to": 16,
        "reopened": 1357,
    },
    "groups": [
        {"name": "layer1.0.conv1", "kind": "filter", "units": 64, "kept": 37, "macs_share": 0.051},
        {"name": "layer2.0.conv1", "kind": "filter", "units": 2048, "kept": 1111, "macs_share": 0.062},
    ],
    "pinned": [{"where": "fc", "channels": 10, "reason": "model output"}],
    "curve": [
        {"step": 10, "phase": "parent", "loss": 2.1, "accuracy": 0.3},
        {"step": 20, "phase": "parent", "loss": 0.9},
        {"step": 30, "phase": "search", "loss": 0.5, "macs": 0.8},
        {"step": 40, "phase": "recover", "loss": 0.2, "macs": 0.5, "accuracy": 0.9},
    ],
    "machine": {"cpu": "Example 9000", "cores": 2, "versions": {"torch": "9.8.7"}},
    "warnings": ["the parent was not trained for long"],
}
NUMBERS = """0.1.7|seed 41|93.1 s|2.31 times as fast.|98.67 %|41.23 %|95.12 %|98.44 %|450|142 336 000|70 740 992
49.70 %|11 172 810|3 456 789|30.94 %|44.71 MB|13.88 MB|31.04 %|-0.23 points|5.43 ms|2.35 ms
2.32x [2.21, 2.43]|3 threads, batch 16|faster|the clock moved|1.2e-07|4.6e-07
asked 50.00 %, reached 49.71 %|it says why|multiples of 16|1 357 units kept only for that
layer1.0.conv1|37 / 64|5.1 %|1 111 / 2 048
6.2 %|fc|model output|Example 9000|torch 9.8.7|the parent was not trained for long|digits:resnet18"""


def plain(text: str) -> str:
    """Text with single spaces and with letters for the signs of typography."""
    signs = {"\N{MINUS SIGN}": "-", "\N{MULTIPLICATION SIGN}": "x"}
    return " ".join(text.translate(str.maketrans(signs)).split())


class Page(HTMLParser):
    """The text and the tags of a page, and whether every tag is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return plain("".join(self.words))


def changed(**values: Any) -> dict[str, Any]:
    return copy.deepcopy(REPORT) | values


def test_every_number_is_on_the_page() -> None:
    text = Page(render(REPORT)).text
    for part in re.split(r"[|\n]", NUMBERS):
        assert part in text, part


def test_the_page_needs_nothing_else() -> None:
    page = render(REPORT)
    tags = Page(page).tags
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(tags)
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_leads_to_the_files_beside_it() -> None:
    links = [value for name, value in Page(render(REPORT)).attributes if name == "href"]
    assert links == ["MODEL_CARD.md", "manifest.json"]


def test_hostile_text_is_only_text() -> None:
    hostile = """<script>alert(1)</script>"' onload='x' {{ 7 * 7 }} &amp;"""

    def poison(value: Any) -> Any:
        if isinstance(value, str):
            return value + hostile
        if isinstance(value, dict):
            return {key: poison(entry) for key, entry in value.items()}
        return [poison(entry) for entry in value] if isinstance(value, list) else value

    clean, poisoned = Page(render(REPORT)), Page(render(poison(REPORT)))
    assert set(poisoned.tags) == set(clean.tags)
    assert {name for name, _ in poisoned.attributes} == {name for name, _ in clean.attributes}
    assert poisoned.text.count(hostile) >= 12


def test_a_page_of_many_groups_has_them_all() -> None:
    groups = [REPORT["groups"][0] | {"name": f"layer{index}.conv"} for index in range(120)]
    page = Page(render(changed(groups=groups)))
    assert all(group["name"] in page.text for group in groups)


def test_a_run_without_training_cutting_or_warnings_still_has_a_page() -> None:
    latency = {"cpu": REPORT["latency"]["cpu"] | {"warnings": []}}
    page = Page(render(changed(curve=[], groups=[], pinned=[], warnings=[], latency=latency)))
    assert "Nothing was trained in this run." in page.text
    assert "No group of this network may be cut." in page.text
    assert "Every channel of this network was free to be removed." in page.text
    assert "note" not in [value for name, value in page.attributes if name == "role"]


def test_a_speed_up_is_asked_in_times() -> None:
    budget = {"kind": "speedup", "asked": 2.0, "reached": 2.31, "note": None, "reopened": 0}
    assert "Speed-up asked 2.00x, reached 2.31x" in Page(render(changed(budget=budget))).text


def test_the_bars_are_as_long_as_what_is_kept() -> None:
    widths = re.findall(r'class="kept" width="([\d.]+)%"', render(REPORT))
    assert widths == ["57.81", "54.25"]


@pytest.mark.parametrize("points", [1, 7, 5000])
def test_the_curve_stays_in_its_frame(points: int) -> None:
    phases = ["parent", "search", "recover"]
    drawing = curve(
        [
            {"step": step % 3000, "phase": phases[3 * step // points], "loss": 3 * math.exp(-step / 50), "macs": 0.5}
            for step in range(points)
        ]
    )
    assert drawing is not None
    numbers = 0
    for line in drawing.lines:
        for across, up in re.findall(r"([\d.]+),([\d.]+)", line.path):
            assert 0 <= float(across) <= WIDTH
            assert 0 <= float(up) <= HEIGHT
            numbers += line.name == "loss"
    assert 0 < numbers <= POINTS + len(phases)
    ends = [phase.left + phase.width for phase in drawing.phases]
    assert [phase.left for phase in drawing.phases[1:]] == pytest.approx(ends[:-1])


def test_a_loss_that_is_not_a_number_is_a_gap() -> None:
    drawing = curve([{"step": 1, "phase": "search", "loss": math.nan}, {"step": 2, "phase": "search", "loss": 1.0}])
    assert drawing is not None
    assert "nan" not in drawing.lines[0].path


def test_the_curve_has_round_ticks() -> None:
    drawing = curve([{"step": 1170, "phase": "search", "loss": 2.3}])
    assert drawing is not None
    assert [tick.text for tick in drawing.losses] == ["0", "0.5", "1", "1.5", "2"]
    assert [plain(tick.text) for tick in drawing.steps] == ["0", "200", "400", "600", "800", "1 000"]


def test_the_table_in_a_terminal() -> None:
    out = io.StringIO()
    verdict = REPORT["latency"]["cpu"] | {"verdict": "[red]not markup[/red]"}
    Console(file=out, width=140).print(summary_table(changed(latency={"cpu": verdict})))
    text = plain(out.getvalue())
    for part in ("Parameters", "MACs", "File size", "Accuracy", "Latency, cpu", "5.43 ms", "2.32x [2.21, 2.43]",
                 "1 357 units kept: steps of 16"):
        assert part in text
    assert "[red]not markup[/red]" in text
    assert [row.name for row in rows(REPORT)] == ["Parameters", "MACs", "File size", "Accuracy", "Latency, cpu"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(1234567), "1 234 567"),
        (size(999), "999 B"),
        (size(1000), "1.00 kB"),
        (size(44_712_345), "44.71 MB"),
        (size(3e9), "3.00 GB"),
        (milliseconds(0.01234), "0.0123 ms"),
        (milliseconds(12.345), "12.3 ms"),
        (milliseconds(1234.5), "1234 ms"),
        (milliseconds(99.97), "100 ms"),
        (figures(123.4), "123"),
        (figures(1234.5), "1234"),
    ],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert plain(text) == expected
