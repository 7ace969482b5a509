"""The profile: every node of a file, its layers by name, the expensive ones on top."""

import onnx
import pytest
import torch
from torch import nn

import export


class Kinds(nn.Module):
    """Every kind of layer: strided, grouped, depthwise, transposed, and linear on tokens and on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, stride=2, padding=2)
        self.grouped = nn.Conv2d(16, 32, 3, padding=2, dilation=2, groups=4)
        self.depthwise = nn.Conv2d(32, 32, (3, 1), padding=(1, 0), groups=32)
        self.up = nn.ConvTranspose2d(32, 8, 2, stride=2)
        self.tokens, self.head = nn.Linear(8, 24, bias=False), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.depthwise(self.grouped(self.stem(x).relu())).relu()).relu()
        return self.head(self.tokens(x.flatten(2).transpose(1, 2)).relu().mean(1))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> export.OnnxFile:
    torch.manual_seed(0)
    return export.to_onnx(Kinds(), torch.randn(2, 3, 16, 16), tmp_path_factory.mktemp("kinds") / "kinds.onnx")


def test_every_layer_of_the_file_is_found_once_with_its_shapes(kinds: export.OnnxFile) -> None:
    layers, rest = export.layers_of(kinds.path, batch=2)
    found = {layer.weight: layer for layer in layers}
    assert len(found) == len(layers) == 6
    assert {name: layer.widths for name, layer in found.items()} == {
        "stem.weight": (3, 16), "grouped.weight": (16, 32), "depthwise.weight": (32, 32), "up.weight": (32, 8),
        "tokens.weight": (8, 24), "head.weight": (24, 5),
    }  # fmt: skip
    assert (found["grouped.weight"].kind.groups, found["depthwise.weight"].kind.groups) == (4, 0)
    assert (found["tokens.weight"].kind.positions, found["tokens.weight"].output) == ((512,), (2, 256, 24))
    assert found["stem.weight"].output == (2, 16, 8, 8)
    assert all(node.layer is None and node.ms >= 0 for node in rest)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.Sigmoid(), nn.Tanh(), nn.GELU()], ids=repr)
def test_linear_layers_are_found_whatever_is_fused_into_them(activation: nn.Module, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), activation, nn.Linear(64, 48), activation, nn.Linear(48, 10))
    export.to_onnx(model, torch.randn(2, 32), tmp_path / "mlp.onnx")
    layers, rest = export.layers_of(tmp_path / "mlp.onnx", runs=2)
    assert [layer.widths for layer in layers] == [(32, 64), (64, 48), (48, 10)]
    assert not any("Gemm" in node.op or "MatMul" in node.op for node in rest)


def test_the_expensive_layer_takes_most_of_the_time(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 7, padding=3), nn.ReLU(), nn.Conv2d(64, 4, 1))
    path = tmp_path_factory.mktemp("shares") / "shares.onnx"
    export.to_onnx(model, torch.randn(1, 3, 24, 24), path)
    times = export.profile(path)
    assert max(times, key=lambda node: node.ms).layer == _node_of(path, "1.weight")
    assert {node.layer for node in times if node.layer} == {_node_of(path, f"{i}.weight") for i in (0, 1, 3)}


def test_a_profile_leaves_no_file_behind(kinds: export.OnnxFile, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export.profile(kinds.path, runs=2)
    assert not list(tmp_path.iterdir())


def test_a_file_without_nodes_takes_no_time(tmp_path) -> None:
    ends = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 4])]
    opset = [onnx.helper.make_opsetid("", 18)]
    graph = onnx.helper.make_graph([], "none", ends, ends)
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "none.onnx")
    assert export.profile(tmp_path / "none.onnx", runs=2) == ()


def test_what_cannot_be_profiled_is_refused_as_in_a_measurement(tmp_path) -> None:
    with pytest.raises(export.BadOnnx, match="there is no such file"):
        export.profile(tmp_path / "none.onnx")
    with pytest.raises(export.BadOnnx, match="there is no such file"):
        export.layers_of(tmp_path / "none.onnx")


def _node_of(path, weight: str) -> str:
    return next(node.name for node in onnx.load(str(path)).graph.node if weight in node.input)
