"""Attention with more or fewer axes than the exporter takes is in the file, and computes the same."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import export
from export.attention import attended


class Windows(nn.Module):
    """Attention in windows, (batch, windows, heads, tokens, channels), as in Hiera and NesT; or without heads."""

    def __init__(self, axes: int, masked: bool) -> None:
        super().__init__()
        self.axes, self.qkv, self.head = axes, nn.Linear(12, 36), nn.Linear(12, 5)
        self.mask = nn.Parameter(torch.randn(*((4, 1, 4, 4) if axes == 5 else (3, 16, 16)))) if masked else None

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        tokens = x.flatten(2).transpose(1, 2)  # (n, 16, 12)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        if self.axes > 3:
            shape = (n, 4, 4, 3, 4) if self.axes == 5 else (n, 16, 3, 4)
            q, k, v = (t.reshape(shape).transpose(-3, -2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, value=v, attn_mask=self.mask)
        return self.head(y.transpose(-3, -2).reshape(n, 16, 12).mean(1) if self.axes > 3 else y.mean(1))


@pytest.mark.parametrize(("axes", "masked"), [(3, False), (4, True), (5, True)])
def test_it_is_exported(axes: int, masked: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = export.to_onnx(Windows(axes, masked).eval(), torch.randn(2, 12, 4, 4), tmp_path / "windows.onnx")
    assert file.parity.worst < 1e-5


@pytest.mark.parametrize("lead", [(), (2,), (2, 3, 5), (2, 3, 5, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_same_attention(lead: tuple[int, ...], masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(*lead, 6, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.randn(*lead[1:], 6, 6, dtype=torch.float64) if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.7)
    torch.testing.assert_close(attended(q, k, v, mask, scale=0.7), expected)
