"""Files of tiny networks, written once for all tests of the export."""

import pytest
import torch
from tiny_networks import plain
from torch import Tensor, nn

import export


@pytest.fixture(scope="session")
def network() -> nn.Module:
    """A plain network in train mode. Shared, so a test that changes it takes a copy."""
    return plain()


@pytest.fixture(scope="session")
def image() -> Tensor:
    return torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, network: nn.Module, image: Tensor) -> dict[str, export.OnnxFile]:
    """`small` is `network`; `dense` is three times as wide."""
    folder = tmp_path_factory.mktemp("files")
    small, dense = folder / "small.onnx", folder / "dense.onnx"
    return {
        "small": export.to_onnx(network, image, small, metadata={"recipe": "none"}, labels=["a", "b", "c", "d", "é"]),
        "dense": export.to_onnx(plain(24), image, dense),
    }
