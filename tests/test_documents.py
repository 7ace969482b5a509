"""Every command and every block of Python in the documentation runs.

Run as written, they would train for minutes; SMALLER lists what the tests replace to make that seconds.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import nn

import diffprune.data
import diffprune.digits
import diffprune.models
from diffprune.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALLER = (
    ("epochs=3", "epochs=0.2"),
    ("--parent-epochs 4", "--parent-epochs 1 --epochs 0.1 --round-to 8"),
    ("--batch 1,8", "--batch 1,8 --seconds 0.5"),
    ('"pruned.onnx"))', '"pruned.onnx", seconds=0.5))'),
)
DATA_NEEDED = "python -m benchmarks."
"""Takes minutes to hours: how a table was made, by the documentation's own record. It is there, with its options."""


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            found.append((document.name, match.group(1)))
    return found


def smaller(text: str) -> str:
    for long, short in SMALLER:
        text = text.replace(long, short)
    return text


def narrow(num_classes: int = 10) -> nn.Module:
    """In the place of the demo's network: two convolutions, which are exported in a second."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, num_classes),
    )  # fmt: skip


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a demo has run."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "runs" / "demo").mkdir(parents=True)
    save_file(narrow().state_dict(), folder / "runs" / "demo" / "dense.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _quick(newcomer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(newcomer)
    monkeypatch.setitem(diffprune.models.DIGITS, "resnet18", narrow)
    monkeypatch.setattr("diffprune.shipping.MEASURE_SECONDS", 0.5)
    monkeypatch.setattr("diffprune.stopwatch.SECONDS", 0.2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(newcomer))


def test_there_is_something_to_run() -> None:
    assert len(blocks("python")) >= 2
    assert len(blocks("sh")) >= 3


@pytest.mark.parametrize(("document", "code"), blocks("python"), ids=lambda v: v if v.endswith(".md") else "")
def test_python_blocks_run(document: str, code: str) -> None:
    exec(compile(smaller(code), document, "exec"), {"__name__": "__main__"})


def test_commands_run_in_the_order_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    ran = 0
    for _, block in blocks("sh"):
        for line in block.splitlines():
            words = shlex.split(smaller(line), comments=True)
            if words and words[0] == "make":
                subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
            elif words and words[0] == "diffprune":
                code, shown = _exit_code(words[1:]), capsys.readouterr()
                assert code == 0 or (words[1] == "verify" and _only_noise(shown.out)), (line, shown)
                ran += 1
            elif words:
                assert line.startswith(DATA_NEEDED), f"unknown command: {line}"
                source = (ROOT / f"{words[2].replace('.', '/')}.py").read_text()
                assert all(f'"{word}"' in source for word in words if word.startswith("--")), line
    assert ran >= 4


def _only_noise(verified: str) -> bool:
    """Half a second on a busy machine may measure another speed-up than half a second before: all else holds."""
    return verified.rstrip().endswith("1 checks failed: speed-up")


def _exit_code(words: list[str]) -> int:
    import sys

    sys.argv = ["diffprune", *words]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path) -> None:
    exec(compile(example.read_text(), example.name, "exec"), {"__name__": "__main__"})
