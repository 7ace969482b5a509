"""What is tried before any work."""

from pathlib import Path

import onnx
import torch
from torch import nn

import export
from diffprune.preparation import alive


class Residual(nn.Module):
    """Starts as the identity, as `zero_init_residual` has it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return (x + self.norm(self.conv(x))).mean((2, 3))


def test_a_branch_that_starts_at_zero_is_measured_as_it_will_be(tmp_path: Path) -> None:
    """`to_onnx` leaves it out, and a speed-up would be refused that can be had once it is trained."""
    model, x = Residual().eval(), torch.randn(2, 1, 8, 8)
    convolutions = []
    for network in (model, alive(model)):
        path = export.for_timing(network, x, tmp_path / "network.onnx")
        convolutions.append([node.op_type for node in onnx.load(path).graph.node].count("Conv"))
    assert convolutions == [1, 2]
    assert not model.norm.weight.any()
