"""Weights of linear layers keep their names in the file, though the exporter transposes and numbers them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import export


class Tokens(nn.Module):
    """Self-attention, two linear layers of one shape, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x, x, x, need_weights=False)[0]
        return self.head(self.a(self.b(self.a(x).relu()).relu()).mean(1))


@pytest.mark.parametrize("alike", [False, True])
def test_every_matrix_is_named_after_the_parameter_that_it_is(alike: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    if alike:
        model.b.weight.data.copy_(model.a.weight)  # stored once
    file = export.to_onnx(model, torch.randn(2, 5, 8), tmp_path / "tokens.onnx")
    graph = onnx.load(file.path).graph
    held = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer if len(entry.dims) == 2}
    expected = {"mix.in_proj_weight.T", "mix.out_proj.weight", "a.weight.T", "head.weight"}
    assert set(held) == expected | (set() if alike else {"b.weight.T"})
    for name, matrix in held.items():
        parameter = model.get_parameter(name.removesuffix(".T")).detach().numpy()
        assert np.array_equal(matrix, parameter.T if name.endswith(".T") else parameter), name
