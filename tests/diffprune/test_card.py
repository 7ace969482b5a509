"""The model card: front matter that can be read, every number, text that stays text, code that runs."""

import copy
import json
import re
from typing import Any

import numpy as np
import onnxruntime
import pytest
from test_report import REPORT, plain

from diffprune.card import code, line, model_card
from diffprune.pruned import Origin

MACHINE = {"cpu": "Example 9000", "cores": 2, "isa": ["avx2", "amx"], "torch": "9.8.7", "onnxruntime": "9.9"}
ABOUT = {
    "source_model": "digits:resnet18",
    "base_model": "digits:resnet18",
    "base_weights": "trained.safetensors",
    "license": "apache-2.0",
    "data": "digits",
    "mean": "[0.305]",
    "std": "[0.376]",
    "input_shape": "[1, 16, 16]",
}
ORIGIN = Origin(10, tuple("0123456789"), ABOUT)


def card(report: dict[str, Any] | None = None, labels: Any = ORIGIN.labels, **about: str) -> str:
    files = {"dense": 44_712_345, "pruned": 13_876_543, "pruned-uint8-static": 13_876_999}
    shown = copy.deepcopy(report or REPORT) | {"machine": MACHINE, "file_bytes": files}
    return model_card(shown, Origin(10, labels, ABOUT | about))


def front(text: str) -> dict[str, str]:
    """The entries of the first level; a YAML reader is not among what the project needs."""
    _, matter, _ = text.split("---\n", 2)
    return dict(re.findall(r"^(\w+): (.*)$", matter, re.MULTILINE))


def test_the_front_matter_is_what_hubs_read() -> None:
    found = front(card())
    assert found["library_name"] == "onnx"
    assert {json.loads(found[key]) for key in ("base_model", "license")} == {"digits:resnet18", "apache-2.0"}
    assert "metrics:\n- accuracy\n" in card()
    assert f"      value: {REPORT['accuracy']['pruned']}\n" in card()


def test_every_number_and_every_file_is_there() -> None:
    text = plain(card())
    numbers = "2.31 times as fast.|142 336 000|30.94 %|98.44 %|-0.23 points|2.32x [2.21, 2.43]|4.6e-07|Example 9000"
    words = "2 cores, avx2, amx|seed 41|450 held-out|3 threads, batch 16|[0.305]|[0.376]|[1, 16, 16]|`9`"
    for part in f"{numbers}|{words}|trained.safetensors|the clock moved".split("|"):
        assert part in text, part
    assert "| `pruned-uint8-static.onnx` | uint8 (batch, height, width, channels), normalised inside; batch 1" in text
    assert "the parent was not trained for long" in text


def test_what_the_data_does_not_say_is_not_invented() -> None:
    text = card(mean="[0.0]", std="[1.0]")
    assert "How pixels were normalised is not known here" in text
    assert "255" not in text
    assert "np.zeros((1, 1, 16, 16), np.float32)" in text


def test_many_labels_are_left_to_the_metadata() -> None:
    assert "`label 3`" not in card(labels=[f"label {index}" for index in range(21)])
    assert "one per class.\n" in card(labels=None)


HOSTILE = "x`` ` <script> | [a](b) *c*\n---\nlicense: mine\n# d"


def test_hostile_text_stays_on_its_line_and_is_only_text() -> None:
    report = REPORT | {"model": HOSTILE, "data": HOSTILE, "verdict": HOSTILE, "warnings": [HOSTILE]}
    text = card(report, labels=[HOSTILE] * 10, license=HOSTILE, base_model=HOSTILE, base_weights=HOSTILE)
    assert len(text.splitlines()) == len(card().splitlines())
    assert json.loads(front(text)["license"]) == HOSTILE
    body = re.sub(r"^```.*?^```", "", text.split("---\n", 2)[2], flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", re.sub(r"\\.", "", body))
    assert "<script>" not in outside
    assert "[a]" not in outside


@pytest.mark.parametrize(("text", "shown"), [("a`b", "`` a`b ``"), ("a\nb", "`a b`"), ("``", "``` `` ```")])
def test_code_is_fenced_with_more_than_it_holds(text: str, shown: str) -> None:
    assert code(text) == shown


def test_a_line_is_one_line() -> None:
    assert line("a\n# b | c <d>") == r"a \# b \| c \<d\>"


@pytest.mark.parametrize("about", [{}, {"mean": "[0.0]", "std": "[1.0]"}])
def test_the_code_on_the_card_runs(about: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[Any] = []

    class Session:
        def __init__(self, path: str, providers: list[str]) -> None:
            assert path == "pruned.onnx"

        def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
            fed.append(feed["input"])
            return [np.zeros((1, 10), np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    (block,) = re.findall(r"^```python\n(.*?)^```", card(**about), re.DOTALL | re.MULTILINE)
    exec(compile(block, "MODEL_CARD.md", "exec"), {})
    assert (fed[0].shape, fed[0].dtype) == ((1, 1, 16, 16), np.float32)
    assert np.allclose(fed[0], 0 if about else -0.305 / 0.376)
