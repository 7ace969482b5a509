"""Run folders: a final name means a finished run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffprune.errors import OutputExists
from diffprune.runfolder import create, next_free, write_atomically


def test_nothing_has_the_final_name_before_the_end(tmp_path: Path) -> None:
    final = tmp_path / "runs" / "a"
    with create(final) as folder:
        folder.write_text("a.txt", "text")
        assert not final.exists()
        assert folder.path.name.startswith(".a.unfinished-")
    assert folder.path == final
    assert [entry.name for entry in final.parent.iterdir()] == ["a"]
    assert (final / "a.txt").read_text() == "text"


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with create(tmp_path / "a") as folder:
        folder.write_text("a.txt", "")
    assert (tmp_path / "a" / "a.txt").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_run_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def run() -> None:
        with create(tmp_path / "a") as folder:
            folder.write_text("a.txt", "")
            raise error

    with pytest.raises(error):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_never_looks_finished(tmp_path: Path) -> None:
    code = (
        "import sys, time; from diffprune.runfolder import create\n"
        "folder = create(sys.argv[1]); folder.write_text('a', 'b'); folder.log({'step': 1})\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "a").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.unfinished-")
    assert (left / "log.jsonl").read_text() == '{"step": 1}\n'
    with create(tmp_path / "a"):
        pass
    assert (tmp_path / "a").is_dir()


def test_a_file_that_cannot_be_written_leaves_the_older_one_alone(tmp_path: Path) -> None:
    target = write_atomically(tmp_path / "a.json", "older")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(target, "\ud800")  # half of a character, which no file can hold
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert target.read_text() == "older"


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "report.json").write_text("{}")
    with pytest.raises(OutputExists, match=r"the output folder is taken(.|\n)*for example .*a-2"):
        create(tmp_path / "a")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "report.json").read_text() == "{}"


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputExists, match="the output folder is a file"):
        create(tmp_path / "a")
    with pytest.raises(OutputExists, match="cannot be made"):
        create(tmp_path / "a" / "b")


def test_a_link_is_refused_because_it_cannot_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "real")
    with pytest.raises(OutputExists, match="taken"):
        create(tmp_path / "a")


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("")
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(OutputExists, match=r"for example .*a-2"):
        create(".")


def test_two_runs_for_one_name_lose_nothing(tmp_path: Path) -> None:
    first, second = create(tmp_path / "a"), create(tmp_path / "a")
    first.write_text("who", "first")
    second.write_text("who", "second")
    first.finish()
    with pytest.raises(OutputExists, match=r"cannot be put in place(.|\n)*complete but hidden"), second:
        pass  # leaving the block finishes
    with pytest.raises(OutputExists, match="complete but hidden"), second:
        second.finish()
    assert (tmp_path / "a" / "who").read_text() == "first"
    assert (second.path / "who").read_text() == "second"


def test_finish_twice_is_once_and_discard_spares_the_finished(tmp_path: Path) -> None:
    folder = create(tmp_path / "a")
    assert folder.finish() == folder.finish() == tmp_path / "a"
    folder.discard()
    assert (tmp_path / "a").is_dir()


def test_next_free_counts(tmp_path: Path) -> None:
    base = tmp_path / "demo"
    assert next_free(base) == base
    for name in ("demo", "demo-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    assert next_free(base) == tmp_path / "demo-3"


def test_json_and_log_are_strict_json(tmp_path: Path) -> None:
    with create(tmp_path / "a") as folder:
        folder.write_json("r.json", {"loss": float("nan"), "list": [float("inf"), 1.5, (2,)], "text": "é"})
        folder.log({"step": 1, "loss": 0.5})
        folder.log({"step": 2, "loss": float("inf")})
        assert json.loads((folder.path / "r.json").read_text()) == {"loss": None, "list": [None, 1.5, [2]], "text": "é"}
        assert not list(folder.path.glob(".*"))
    lines = (tmp_path / "a" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    folder = create(tmp_path / "a")
    folder.write_text("a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        folder.write_text("a.txt", "new \ud800")
    assert (folder.path / "a.txt").read_text() == "old"


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(OutputExists, match="the output folder cannot be made: File name too long"):
        create("b" * 300)
