"""A layer whose weights are all zero gives a constant: what leads to it is not in the file."""

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import export


class Block(nn.Module):
    """x + branch(x) with the kind of branch that residual networks and transformers have."""

    def __init__(self, branch: nn.Module, before: nn.Module) -> None:
        super().__init__()
        self.before, self.branch, self.head = before, branch, nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.head((x + self.branch(x)).relu().flatten(1))


def convolutions() -> tuple[Block, Tensor, nn.Parameter]:
    last = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    branch = nn.Sequential(nn.Conv2d(4, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), last, nn.BatchNorm2d(4))
    return Block(branch, nn.Conv2d(1, 4, 1)), torch.randn(2, 1, 6, 6), last.weight


def tokens() -> tuple[Block, Tensor, nn.Parameter]:
    last = nn.Linear(2, 4)
    return Block(nn.Sequential(nn.Linear(4, 2), nn.GELU(), last), nn.Linear(3, 4)), torch.randn(2, 5, 3), last.weight


def operators(model: nn.Module, x: Tensor, path: Path) -> Counter[str]:
    export.to_onnx(model, x, path)  # which compares the file with the network
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("make", [convolutions, tokens])
def test_a_branch_that_ends_in_zeros_is_not_in_the_file_but_its_bias_is(make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    block, x, last = make()
    block.eval()(x)
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias)
    whole = operators(block, x, tmp_path / "whole.onnx")
    with torch.no_grad():
        last.zero_()
    assert block.branch(block.before(x)).any()
    left = operators(block, x, tmp_path / "closed.onnx")
    heavy = ("Conv", "MatMul", "Gemm")
    assert sum(left[op] for op in heavy) == sum(whole[op] for op in heavy) - 2
    assert left["Add"] >= 1
    assert (tmp_path / "closed.onnx").stat().st_size < (tmp_path / "whole.onnx").stat().st_size


class Spread(nn.Module):
    """What a zero layer gives is all that tells the size of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.row = nn.Conv2d(1, 4, 1), nn.Parameter(torch.randn(1, 4, 1, 1))
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) + x.mean((2, 3), keepdim=True) * self.row).flatten(1)


class Read(nn.Module):
    """The zero layer's values are read by something else than a sum."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.layer, self.twice = nn.Conv2d(1, 4, 1), twice
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (x + y) * y.sigmoid() if self.twice else x + y.cumsum(1)


@pytest.mark.parametrize("model", [Spread(), Read(False), Read(True)], ids=["spread", "other reader", "two readers"])
def test_a_zero_layer_stays_where_its_shape_or_its_values_matter(model: nn.Module, tmp_path: Path) -> None:
    assert operators(model.eval(), torch.randn(2, 1, 4, 4), tmp_path / "kept.onnx")["Conv"] == 1


class Twice(nn.Module):
    """Two layers end in a sum; the weight of one serves a layer that does not as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x).relu() + self.b(x)
        return (x + self.b(x).relu() + self.a(x)).sigmoid() + self.a(x).tanh()


def test_only_weights_all_of_whose_layers_end_in_sums_are_named(tmp_path: Path) -> None:
    block, x, _ = tokens()
    block.eval()(x)
    export.for_timing(block, x, tmp_path / "tokens.onnx")
    assert len(export.ending_in_sums(tmp_path / "tokens.onnx")) == 1
    block, x, _ = convolutions()
    block.eval()(x)
    export.for_timing(block, x, tmp_path / "convolutions.onnx")
    assert export.ending_in_sums(tmp_path / "convolutions.onnx") == {"branch.3.weight"}
    export.for_timing(Twice().eval(), torch.randn(2, 4, 3, 3), tmp_path / "twice.onnx")
    assert export.ending_in_sums(tmp_path / "twice.onnx") == set()
