"""The table of layers: measured as they are in the network, remembered, and resumed."""

import json
import math
from pathlib import Path

import onnx
import pytest
import torch
from test_export_profiling import Kinds
from torch import nn

import export
from export import layers as module
from export.layer_kinds import LayerKind, Widths

CONV = LayerKind("Conv", (3, 3), (("pads", (1, 1, 1, 1)), ("strides", (1, 1))), 1, (8, 8))
LINEAR = LayerKind("MatMul", (), (), 1, (4,))
WANTED: dict[LayerKind, list[Widths]] = {CONV: [(16, 16), (16, 32)], LINEAR: [(64, 10)]}


def test_a_layer_measured_alone_computes_what_it_does_in_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "kinds.onnx"
    export.to_onnx(Kinds(), torch.randn(2, 3, 16, 16), path)
    layers, _ = export.layers_of(path, batch=2, runs=2)
    for layer in layers:
        alone = onnx.shape_inference.infer_shapes(module.side_by_side(layer.kind, [layer.widths], 2), strict_mode=True)
        shape = tuple(d.dim_value for d in alone.graph.output[0].type.tensor_type.shape.dim)
        rows = layer.kind.op == "MatMul"
        assert shape == ((math.prod(layer.output[:-1]), layer.output[-1]) if rows else layer.output), layer.weight
    wanted = {layer.kind: [layer.widths] for layer in layers}
    table = export.layer_table(wanted, export.Settings(batch=2), folder=tmp_path)
    assert set(table) == {(layer.kind, layer.widths) for layer in layers}
    assert min(table.values()) > 0


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_a_product_has_all_its_rows_whatever_the_batch(rows: int, tmp_path: Path) -> None:
    kind = LayerKind("MatMul", (), (), 1, (rows,))
    (shape,) = (value.type.tensor_type.shape for value in module.side_by_side(kind, [(64, 10)], 4).graph.input)
    assert [axis.dim_value for axis in shape.dim] == [rows, 64]
    assert export.layer_table({kind: [(64, 10)]}, export.Settings(batch=4), folder=tmp_path)[kind, (64, 10)] > 0


@pytest.mark.parametrize("width", [4, 49])
def test_channels_that_the_runtime_pads_are_not_counted(tmp_path: Path, width: int) -> None:
    network = nn.Sequential(nn.Conv2d(32, width, 3), nn.ReLU(), nn.Conv2d(width, 32, 3))
    export.to_onnx(network, torch.randn(2, 32, 12, 12), tmp_path / "odd.onnx")
    layers, _ = export.layers_of(tmp_path / "odd.onnx", runs=2)
    assert [layer.macs for layer in layers] == [32 * width * 9 * 100, 32 * width * 9 * 64]
    assert [layer.output for layer in layers] == [(1, width, 10, 10), (1, 32, 8, 8)]


def test_more_channels_take_longer(tmp_path: Path) -> None:
    table = export.layer_table({CONV: [(16, 16), (256, 256)]}, folder=tmp_path)
    assert table[CONV, (256, 256)] > 10 * table[CONV, (16, 16)]  # 256 times the multiply-adds


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_layers_of_any_width_are_found_however_onnxruntime_fills_them_up(tmp_path: Path, op: str, groups: int) -> None:
    kind = LayerKind(op, (3, 3), (("pads", (1, 1, 1, 1)), ("strides", (1, 1))), groups, (8, 8))
    widths = [2, 4, 6, 8, 12, 16, 20, 24]
    pairs = [(a, a) for a in widths] if groups == 0 else [(a, b) for a in widths for b in widths]
    assert len(export.layer_table({kind: pairs}, folder=tmp_path)) == len(pairs)


def test_what_was_measured_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = export.layer_table(WANTED, folder=tmp_path)
    monkeypatch.setattr(module, "profile", _never)
    assert export.layer_table(WANTED, folder=tmp_path) == first
    with pytest.raises(AssertionError, match="measured again"):
        export.layer_table(WANTED, export.Settings(threads=2), folder=tmp_path)  # another target


def test_an_interrupted_table_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = module.profile, []

    def stopping(path: Path, **settings: int) -> tuple[export.NodeTime, ...]:
        if seen:
            raise KeyboardInterrupt
        seen.append(path)
        return real(path, **settings)

    monkeypatch.setattr(module, "profile", stopping)
    with pytest.raises(KeyboardInterrupt):
        export.layer_table(WANTED, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    assert set(json.loads(file.read_text())) == {CONV.entry(widths) for widths in WANTED[CONV]}
    seen.clear()
    assert len(export.layer_table(WANTED, folder=tmp_path)) == 3
    assert len(seen) == 1  # only the linear layer


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"a": null}'])
def test_a_damaged_memory_is_measured_again(tmp_path: Path, content: str) -> None:
    export.layer_table({LINEAR: [(64, 10)]}, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert export.layer_table({LINEAR: [(64, 10)]}, folder=tmp_path)[LINEAR, (64, 10)] > 0
    assert LINEAR.entry((64, 10)) in json.loads(file.read_text())


def test_weights_beyond_what_a_file_holds_are_measured_in_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, files = module.side_by_side, []

    def seen(kind: LayerKind, pairs: list[Widths], batch: int) -> onnx.ModelProto:
        files.append(real(kind, pairs, batch))
        return files[-1]

    monkeypatch.setattr(module, "side_by_side", seen)
    monkeypatch.setattr(module, "PORTION", 40_000)
    pairs = [(a, b) for a in (16, 32, 64, 128) for b in (16, 64, 128)]
    table = export.layer_table({LINEAR: pairs}, folder=tmp_path)
    assert list(table) == [(LINEAR, pair) for pair in pairs]
    assert sum(len(file.graph.initializer) for file in files) == len(pairs)
    for file in files:
        weights = [len(weight.raw_data) for weight in file.graph.initializer]
        assert sum(weights) <= 40_000 or len(weights) == 1
    assert 2 < len(files) < len(pairs)


def test_a_memory_that_cannot_be_written_loses_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert export.layer_table({LINEAR: [(64, 10)]}, folder=tmp_path / "file")[LINEAR, (64, 10)] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Pooled(nn.Module):
    """Products with a vector and with a stack of matrices, neither of which is a layer of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.w = nn.Linear(6, 8), nn.Parameter(torch.randn(8))
        self.stack, self.last = nn.Parameter(torch.randn(3, 8, 8)), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).relu()
        mixed = (h.unsqueeze(1) @ self.stack).sum(1)
        return self.last((mixed * (mixed @ self.w).softmax(1).unsqueeze(2)).sum(1))


def test_products_without_two_widths_are_no_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export.for_timing(Pooled().eval(), torch.randn(2, 5, 6), tmp_path / "pooled.onnx")
    layers, rest = export.layers_of(tmp_path / "pooled.onnx", runs=2)
    assert [layer.widths for layer in layers] == [(6, 8), (8, 4)]
    assert sum(time.op == "MatMul" for time in rest) == 2


def _never(*_: object, **__: object) -> None:
    raise AssertionError("measured again")


@pytest.mark.parametrize("settings", [export.Settings("cuda"), export.Settings(precision="fp16")], ids=["cuda", "fp16"])
def test_what_onnxruntime_tells_no_times_of_is_not_timed_on_the_cpu(settings: export.Settings, tmp_path: Path) -> None:
    with pytest.raises(export.CannotMeasure, match="single layers were asked of onnxruntime on"):
        export.layer_table({LINEAR: [(64, 10)]}, settings, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_layers_of_a_file_whose_nodes_have_no_names(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 4))
    export.to_onnx(network, torch.randn(2, 3, 8, 8), tmp_path / "named.onnx")
    model = onnx.load(tmp_path / "named.onnx")
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "bare.onnx")
    named, bare = (export.layers_of(tmp_path / name, runs=2) for name in ("named.onnx", "bare.onnx"))
    assert [layer.weight for layer in bare[0]] == [layer.weight for layer in named[0]] == [
        "0.weight", "2.weight", "4.weight",
    ]  # fmt: skip
    assert len(bare[1]) == len(named[1])
