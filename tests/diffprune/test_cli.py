"""The command line: help without torch, settings from options and files, exit codes, interruption."""

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from newcomer import MODULE, typed, working_in

import diffprune
from diffprune import run as run_module
from diffprune.config import Config, load_config, to_toml
from diffprune.demo import demo_config
from diffprune.options import lines_of
from diffprune.run import Finished

COMMANDS = ("demo", "compress", "inspect", "bench", "explain", "export", "verify", "quantize")


@pytest.fixture(autouse=True)
def here(tmp_path: Path) -> Iterator[Path]:
    with working_in(tmp_path) as folder:
        yield folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The settings that a command would have run with."""
    configs: list[Config] = []

    def note(config: Config, **_: Any) -> Finished:
        configs.append(config)
        latency = {"dense_ms": 2.0, "pruned_ms": 1.0, "speedup": 2.0, "low": 1.9, "high": 2.1, "threads": 1}
        pair = {"dense": 2, "pruned": 1}
        report = {
            "accuracy": {"dense": 0.9, "pruned": 0.9, "examples": 10},
            "budget": {"reopened": 3, "round_to": 8},
            **dict.fromkeys(("macs", "params", "file_bytes"), pair),
            "latency": {"cpu": {**latency, "batch": 1, "verdict": "faster", "warnings": ["mind", "mind"]}},
            "verdict": "It is [b]faster[/b].",
            "warnings": ["mind"],
        }
        return Finished(Path(config.output), report)

    monkeypatch.setattr(run_module, "run", note)
    return configs


def command(*words: str, **options: Any) -> subprocess.Popen[str]:
    code = [sys.executable, "-m", "diffprune", *words]
    return subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def _hears() -> None:
    """A shell's background jobs ignore interrupts, and hand that on to what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_help_comes_without_torch() -> None:
    asked = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    code = (
        f"import sys\nfrom diffprune.cli import main\nfor words in {asked!r}:\n"
        "    sys.argv = ['diffprune', *words]\n"
        "    try:\n        main()\n    except SystemExit as stop:\n"
        "        print('ended', words, stop.code, sorted({'torch', 'onnx', 'numpy'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ended = [line for line in found.stdout.splitlines() if line.startswith("ended")]
    assert ended == [f"ended {words} 0 []" for words in asked]
    assert found.stderr == ""


def test_help_lists_the_commands_whole() -> None:
    lines = typed("--help").out.splitlines()
    for name in COMMANDS:
        (line,) = (line for line in lines if line.startswith(f"  {name} "))
        assert line.endswith("."), "not cut off"
    assert max(map(len, lines)) <= 80


def test_no_command_is_help_and_an_error() -> None:
    found = typed()
    assert found.code == 2
    assert "compress" in found.out + found.err


def test_the_version_is_the_packages() -> None:
    assert typed("--version").out == f"diffprune {diffprune.__version__}\n"


def test_every_setting_is_an_option() -> None:
    text = typed("compress", "--help").out
    for name in Config.model_fields:
        assert f"--{name.replace('_', '-')} " in text, name


def test_flags_are_settings_like_any_other(asked: list[Config]) -> None:
    Path("run.toml").write_text('model = "a:b"\ndata = "digits"\nparams = 0.4\noutput = "o"\nstatic_twin = true\n')
    assert typed("compress", "--config", "run.toml", "--preprocessing", "--license", "mit").code == 0
    assert (asked[0].static_twin, asked[0].preprocessing, asked[0].license) == (True, True, "mit")


def test_options_win_over_the_file(asked: list[Config]) -> None:
    Path("run.toml").write_text('model = "a:b"\ndata = "digits"\nparams = 0.4\nepochs = 2\noutput = "o"\n')
    assert typed("compress", "--config", "run.toml").code == 0
    assert typed("compress", "--config", "run.toml", "--epochs", 3, "--macs", 0.3, "--round-to", 8).code == 0
    first, second = asked
    assert (first.params, first.macs, first.epochs, first.round_to) == (0.4, None, 2.0, "auto")
    assert (second.params, second.macs, second.epochs, second.round_to) == (None, 0.3, 3.0, 8)
    assert first.model == second.model == "a:b"


def test_the_defaults_in_the_help_are_those_of_the_settings() -> None:
    text = " ".join(typed("compress", "--help").out.split())
    for name, field in Config.model_fields.items():
        if field.default not in (None, ...) and not field.is_required():
            default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            default = "off" if field.default is False else default
            option = text[text.index(f"--{name.replace('_', '-')} ") :]
            assert option[: option.find(" --", 2)].endswith(f"[{default}]"), name


def test_the_demo_is_a_config_like_any_other(asked: list[Config], here: Path) -> None:
    assert typed("demo").code == typed("demo", "--output", "elsewhere").code == 0
    assert asked == [demo_config("runs/demo"), demo_config("elsewhere")]
    (here / "demo.toml").write_text(to_toml(asked[0]))
    assert load_config("demo.toml") == asked[0]


def test_a_second_demo_gets_a_folder_of_its_own(asked: list[Config], here: Path) -> None:
    (here / "runs/demo").mkdir(parents=True)
    (here / "runs/demo/report.json").write_text("{}")
    assert typed("demo").code == 0
    assert asked[0].output == "runs/demo-2"


def test_the_end_of_a_run_says_each_thing_once(asked: list[Config]) -> None:
    out = typed("demo").out
    assert out.count("warning: mind") == 1
    assert "It is [b]faster[/b]." in out, "no markup"
    assert "open runs/demo/report.html" in out


def test_a_fault_of_ours_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors that say what, where, effect and fix are shown without one."""

    def fail(config: Config, **_: Any) -> Finished:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(run_module, "run", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        typed("demo")


def test_a_full_disk_is_no_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Config, **_: Any) -> Finished:
        raise OSError(errno.ENOSPC, "No space left on device", "pruned.onnx")

    monkeypatch.setattr(run_module, "run", fail)
    outcome = typed("compress", *f"--model {MODULE}:factory --data digits --macs 0.5 --output runs/one".split())
    assert outcome.code == 2
    assert "OSError: No space left on device\n  at      pruned.onnx" in outcome.err


def test_names_of_classes_are_the_lines_of_a_file(here: Path) -> None:
    for text in ("cat\ndog\u2028s\n", "\ufeffcat\r\ndog\u2028s"):
        (here / "names.txt").write_bytes(text.encode())
        assert lines_of(here / "names.txt", "--labels") == ("cat", "dog\u2028s")


def test_a_network_is_not_replaced_by_numbers(here: Path) -> None:
    (here / "a.onnx").write_bytes(b"mine")
    outcome = typed("bench", "a.onnx", "--json", "a.onnx")
    assert outcome.code == 2
    assert "--json is 'a.onnx', which would be replaced" in outcome.err
    assert (here / "a.onnx").read_bytes() == b"mine"


def test_errors_of_all_three_packages_are_exit_code_2() -> None:
    from diffprune.endings import last_words
    from diffprune.errors import BadData
    from export import BadOnnx
    from surgery import BadFile

    for kind in (BadData, BadOnnx, BadFile):
        assert last_words(kind("fact", at="a", effect="b", fix="c")).startswith(f"{kind.__name__}: fact\n  at      a\n")
    assert last_words(ValueError("fact")) is None


def test_a_name_in_a_file_does_not_steer_the_terminal(here: Path) -> None:
    outcome = typed("bench", "\x1b[2Jabsent.onnx")
    assert outcome.code == 2
    assert "\\x1b[2Jabsent.onnx" in outcome.err
    assert "\x1b" not in outcome.err


def test_refusal_and_wrong_usage_are_exit_code_2_in_a_shell() -> None:
    for words, fact in (("--config absent.toml", "BadConfig: "), ("--modle x", "No such option")):
        child = command("compress", *words.split())
        out, err = child.communicate()
        assert (child.returncode, out) == (2, "")
        assert fact in err
        assert "Traceback" not in err


def test_a_run_that_is_interrupted_leaves_nothing(here: Path) -> None:
    words = f"compress --model {MODULE}:colour --data npz:colour.npz --batch 8 --epochs 100000 --macs 0.5"
    child = command(*words.split(), "--round-to", "1", "--output", "runs/one", preexec_fn=_hears)
    try:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("searching"):
                break
        else:
            pytest.fail("the run ended before the search")
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert list((here / "runs").iterdir()) == []
    assert child.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
