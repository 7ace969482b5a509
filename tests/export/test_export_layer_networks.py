"""Layers in torch: the same as in the file, timed alone, and what is left of the whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from test_export_layers import CONV, LINEAR
from test_export_profiling import Kinds
from torch import nn

import export
from export import LayerKind, Settings, Widths, torch_layers
from export import layer_networks as module

EAGER = Settings(batch=2, runtime="eager")


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer alone takes a millisecond, and the whole network ten."""
    def table(wanted: Mapping[LayerKind, Sequence[Widths]], _: Settings) -> dict[tuple[LayerKind, Widths], float]:
        return {(kind, widths): 1.0 for kind, pairs in wanted.items() for widths in pairs}

    monkeypatch.setattr(torch_layers, "layer_table", table)
    monkeypatch.setattr(torch_layers, "fastest", lambda candidate, settings: 10.0)


def test_they_are_those_of_the_file(tmp_path: Path, alike: None) -> None:
    torch.manual_seed(0)
    network, x = Kinds(), torch.randn(2, 3, 16, 16)
    there, _ = export.layers_of(export.for_timing(network, x, tmp_path / "kinds.onnx"), batch=2, runs=1)
    here, _ = export.network_layers(network, x, EAGER)
    for one, other in zip(here, there, strict=True):
        assert (one.widths, one.macs, one.bytes) == (other.widths, other.macs, other.bytes)
        assert (one.kind.groups, one.kind.kernel, one.kind.positions) == (
            other.kind.groups, other.kind.kernel, other.kind.positions
        )  # fmt: skip
    names = [name for name, p in network.named_parameters() if p.dim() > 1]
    assert [layer.weight for layer in here] == [layer.weight for layer in there] == names


def test_a_layer_alone_writes_what_it_does_in_the_network(alike: None) -> None:
    layers, _ = export.network_layers(Kinds(), torch.randn(2, 3, 16, 16), EAGER)
    for layer in layers:
        network, x = module.single_layer(layer.kind, layer.widths, 2)
        assert network(x).numel() == torch.Size(layer.output).numel(), layer.weight


def test_what_layers_do_not_take_is_the_rest(alike: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 16, 16)
    layers, rest = export.network_layers(Kinds(), x, EAGER)
    assert ([layer.ms for layer in layers], rest) == ([1.0] * 6, 4.0)
    monkeypatch.setattr(torch_layers, "fastest", lambda candidate, settings: 3.0)
    layers, rest = export.network_layers(Kinds(), x, EAGER)
    assert ([layer.ms for layer in layers], rest) == ([0.5] * 6, 0.0)


def test_what_pads_with_a_word_belongs_to_the_rest(alike: None) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 1)
    )
    layers, rest = export.network_layers(network, torch.randn(2, 3, 8, 8), EAGER)
    assert [layer.weight for layer in layers] == ["2.weight"]
    assert rest == 9.0


def test_the_clock_tells_more_channels_from_fewer_and_what_it_told_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {CONV: [(16, 16), (256, 256)], LINEAR: [(64, 10)]}
    state = torch.random.get_rng_state()
    table = export.layer_table(wanted, EAGER, folder=tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert table[CONV, (256, 256)] > 10 * table[CONV, (16, 16)]  # 256 times the multiply-adds
    monkeypatch.setattr(module, "_alone", lambda kind, widths, settings: 0.0)
    assert export.layer_table(wanted, EAGER, folder=tmp_path) == table
    other = export.layer_table({LINEAR: [(64, 10)]}, Settings(batch=2), folder=tmp_path)
    assert other[LINEAR, (64, 10)] > 0, "onnxruntime is another target"
    assert len(list(tmp_path.iterdir())) == 2


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(input=x)
        return y


def test_a_layer_may_be_called_by_name(alike: None) -> None:
    layers, _ = export.network_layers(ByName(), torch.randn(2, 3), EAGER)
    assert [(layer.weight, layer.widths) for layer in layers] == [("layer.weight", (3, 4))]


def test_a_layer_in_a_row_is_computed_so_often() -> None:
    calls: list[None] = []
    layer = nn.Linear(3, 3)
    layer.register_forward_hook(lambda *_: calls.append(None))
    module.InARow(layer)(torch.randn(1, 3))
    assert len(calls) == module.IN_A_ROW


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu(tmp_path: Path) -> None:
    settings = Settings("cuda", batch=2, runtime="cuda-graph")
    layers, rest = export.network_layers(Kinds(), torch.randn(2, 3, 16, 16), settings)
    assert len(layers) == 6
    assert min(layer.ms for layer in layers) > 0 <= rest
    table = export.layer_table({CONV: [(64, 64), (2048, 2048)]}, settings, folder=tmp_path)
    assert table[CONV, (2048, 2048)] > 4 * table[CONV, (64, 64)]
