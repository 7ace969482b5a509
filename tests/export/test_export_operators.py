"""The exporter's table of operators is made once, and left as it was."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

import export
from export import operators

original = vars(ONNXRegistry)["from_torchlib"]


def test_a_second_export_reads_no_source_again_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    made, anew = [], operators._made_anew
    monkeypatch.setattr(operators, "_made_anew", lambda **given: made.append(given) or anew(**given))
    operators._table.cache_clear()
    one, two = (export.to_onnx(model, x, tmp_path / name).sha256 for name in ("one.onnx", "two.onnx"))
    assert one == two
    assert made == [{"opset_version": 18}]


def test_outside_the_exporter_is_as_torch_left_it() -> None:
    with operators.operators_once():
        assert ONNXRegistry.from_torchlib(opset_version=18) is ONNXRegistry.from_torchlib(opset_version=18)
    assert vars(ONNXRegistry)["from_torchlib"] is original


def test_two_exports_that_overlap_leave_it_so_too() -> None:
    first, second = operators.operators_once(), operators.operators_once()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert vars(ONNXRegistry)["from_torchlib"] is original


def test_a_torch_that_keeps_it_elsewhere_exports_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "Registry", None)
    export.to_onnx(nn.Linear(2, 2).eval(), torch.randn(2, 2), tmp_path / "linear.onnx")
    assert vars(ONNXRegistry)["from_torchlib"] is original


def test_an_operator_that_torch_learns_later_is_known() -> None:
    with operators.operators_once():
        before = ONNXRegistry.from_torchlib(opset_version=18)
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("learned_later(Tensor x) -> Tensor")
        assert ONNXRegistry.from_torchlib(opset_version=18) is not before
