"""`diffprune bench` over several settings."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import export
from diffprune.cli import main


def test_what_was_measured_is_told_before_a_later_setting_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    export.to_onnx(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")
    words = ["bench", "net.onnx", "--precision", "fp32,fp16", "--seconds", "0.2", "--json", "found.json"]
    monkeypatch.setattr(sys, "argv", ["diffprune", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert "median" in out
    assert "precision fp16 asked of a file whose weights are fp32" in err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["precision"] == "fp32"
    assert found["failure"].startswith("precision fp16 asked")


def test_files_of_the_same_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, width in (("a", 64), ("b", 4)):
        (tmp_path / folder).mkdir()
        export.to_onnx(nn.Conv2d(3, width, 3), torch.randn(1, 3, 32, 32), tmp_path / folder / "net.onnx")
    monkeypatch.setattr(sys, "argv", ["diffprune", "bench", "a/net.onnx", "b/net.onnx", "--seconds", "0.2"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    assert "b/net.onnx, compared with a/net.onnx, is " in capsys.readouterr().out
