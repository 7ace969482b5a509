"""What `diffprune explain` says of layers: pairs, shares of the roofline, and why one did not get faster."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_export_profiling import Kinds
from torch import nn

import export
import surgery
from diffprune.errors import BadRun
from diffprune.explaining import explain_lines, explained, why
from export import LayerKind, Roofline, TimedLayer
from export.layers import HALF_A_TICK

ROOF = Roofline(macs=1e8, copies=((1 << 30, 1e7),), threads=1)
CONV = LayerKind("Conv", (3, 3), (("pads", (1, 1, 1, 1)),), 1, (14, 14))
DENSE = TimedLayer(CONV, (256, 256), "conv.weight", (1, 256, 14, 14), 1.2)


def pruned(widths: tuple[int, int], ms: float) -> TimedLayer:
    return replace(DENSE, widths=widths, output=(1, widths[1], 14, 14), ms=ms)


@pytest.mark.parametrize(
    ("small", "reason"),
    [
        (pruned((128, 128), 0.32), ""),  # 4 times fewer multiply-adds, 3.75 times faster
        (pruned((128, 127), 0.6), "width off the step of 16"),
        (pruned((128, 128), 0.6), "below the roofline"),
        (pruned((16, 16), 0.2), "too narrow to fill blocks"),
        (pruned((16, 16), 0.006), "fixed cost of a call"),
    ],
)
def test_the_reason_for_a_layer_that_did_not_get_faster(small: TimedLayer, reason: str) -> None:
    assert why(DENSE, small, ROOF, 16) == reason


def test_a_matrix_with_one_row_is_bound_by_memory() -> None:
    dense = TimedLayer(LayerKind("MatMul", (), (), 1, (1,)), (4096, 4096), "fc.weight", (1, 4096), 8.0)
    assert (dense.macs, dense.bytes) == (4096**2, 4 * (4096**2 + 2 * 4096))
    assert ROOF.ms(dense) == dense.bytes / 1e7
    small = replace(dense, widths=(2048, 4096), ms=7.0)
    assert why(dense, small, ROOF, 16) == "memory-bound"


def test_multiply_adds_of_layers_are_those_of_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Kinds().eval(), torch.randn(1, 3, 16, 16)
    file = export.to_onnx(model, x, tmp_path / "kinds.onnx")
    layers, _ = export.layers_of(file.path, runs=1)
    assert sum(layer.macs for layer in layers) == surgery.SizeModel(surgery.trace(model, x)).dense.macs


def test_every_layer_of_a_run_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    graph = surgery.trace(model, x)
    keep = {group.name: torch.arange(group.units) < 16 for group in graph.groups}
    export.to_onnx(model, x, tmp_path / "dense.onnx")
    export.to_onnx(surgery.cut(model, graph, keep), x, tmp_path / "pruned.onnx")
    for line in explain_lines(tmp_path):
        Console(width=120).print(line)
    text = capsys.readouterr().out
    for row in ("3 > 48", "3 > 16", "48 > 64", "16 > 16", "64 > 5", "16 > 5", "ReduceMean", "% of the roofline"):
        assert row in text, row
    (tmp_path / "pruned.onnx").unlink()
    with pytest.raises(BadRun, match=r"the folder has no pruned\.onnx"):
        list(explain_lines(tmp_path))


def test_files_without_layers_are_explained_too(tmp_path: Path) -> None:
    for name in ("dense.onnx", "pruned.onnx"):
        export.to_onnx(nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), torch.randn(2, 3, 8, 8), tmp_path / name)
    assert "roofline" not in "".join(line for line in explain_lines(tmp_path) if isinstance(line, str))


def test_layers_are_paired_by_name_whatever_their_order() -> None:
    other = replace(DENSE, weight="other.weight")
    rows = explained([DENSE, other], [replace(other, ms=0.6), replace(DENSE, ms=0.4)], ROOF, 16)
    assert [(row.dense.weight, row.pruned.ms) for row in rows] == [("conv.weight", 0.4), ("other.weight", 0.6)]


def test_a_layer_that_runs_twice_is_explained_twice() -> None:
    again = [replace(DENSE, ms=0.5), replace(DENSE, ms=0.7)]
    assert [row.pruned.ms for row in explained([DENSE, DENSE], again, ROOF, 16)] == [0.5, 0.7]


def test_a_layer_that_is_gone_leaves_the_others_their_pairs() -> None:
    product = TimedLayer(LayerKind("MatMul", (), (), 1, (4,)), (64, 64), "a.weight", (1, 4, 64), 1.0)
    dense = [DENSE, product, replace(product, weight="b.weight")]
    left = [DENSE, replace(product, weight="b.weight", ms=0.5)]
    pairs = [(row.dense.weight, row.pruned.ms) for row in explained(dense, left, ROOF, 16)]
    assert pairs == [("conv.weight", 1.2), ("b.weight", 0.5)]


def test_a_layer_quicker_than_the_clock_takes_half_a_tick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    file = export.to_onnx(small, torch.randn(2, 1, 4, 4), tmp_path / "tiny.onnx")
    real = export.layers.profile
    monkeypatch.setattr(
        "export.layers.profile", lambda *a, **k: tuple(replace(node, ms=0.0) for node in real(*a, **k))
    )
    layers, _ = export.layers_of(file.path)
    assert {layer.ms for layer in layers} == {HALF_A_TICK}
    assert len(explained(layers, layers, ROOF, 8)) == 2


def test_a_depthwise_transposed_convolution_multiplies_each_channel_once() -> None:
    kind = LayerKind("ConvTranspose", (2, 2), (("strides", (2, 2)),), 0, (4, 4))
    assert TimedLayer(kind, (8, 8), "up.weight", (1, 8, 8, 8), 1.0).macs == 8 * 4 * 4 * 2 * 2


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    for name in ("dense.onnx", "pruned.onnx"):
        (tmp_path / name).write_bytes(b"this is not a network")
    with pytest.raises(export.BadOnnx, match="cannot load the file"):
        list(explain_lines(tmp_path))


def test_what_a_cache_holds_moves_faster_than_memory() -> None:
    roof = Roofline(macs=1e8, copies=((1000, 5e7), (1_000_000, 1e7)), threads=1)
    assert [roof.rate(moved) for moved in (10, 1000, 1001, 5_000_000)] == [5e7, 5e7, 1e7, 1e7]


def test_a_measured_roofline_is_no_slower_where_less_is_moved() -> None:
    rates = [rate for _, rate in export.measure_roofline().copies]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
