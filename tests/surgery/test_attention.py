"""Attention and shuffles of torchvision, small: every width and every head free, twins equal to their originals."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from oracle import random_keep, relative_error
from torch import nn
from torchvision.models import VisionTransformer, shufflenet_v2_x0_5
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from zoo import randomised

import surgery
from surgery.twins import TWINS, twinned

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "vit": (partial(VisionTransformer, 32, 8, 2, 3, 24, 48, num_classes=10), 32, 2),
    "swin": (partial(SwinTransformer, [4, 4], 24, [2, 2], [3, 6], [4, 4], num_classes=10), 36, 4),
    "swin_v2": (
        partial(SwinTransformer, [4, 4], 24, [2, 2], [3, 6], [4, 4], num_classes=10, block=SwinTransformerBlockV2,
                downsample_layer=PatchMergingV2), 36, 4,
    ),
    "maxvit": (partial(MaxVit, (64, 64), 16, 4, [16, 24], [1, 1], 8, 0.0, num_classes=10), 64, 4),
    "convnext": (partial(ConvNeXt, [CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 1)], num_classes=10), 32, 0),
    "shufflenet": (partial(shufflenet_v2_x0_5, num_classes=10), 64, 0),
    "encoder": (
        lambda: nn.Sequential(nn.Flatten(2), nn.Linear(16, 12), nn.TransformerEncoderLayer(12, 3, 20, batch_first=True),
                              nn.Flatten(), nn.Linear(36, 10)), 4, 1,
    ),
}


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    build, size, _ = NETWORKS[name]
    torch.manual_seed(0)
    return randomised(build()).double().eval(), torch.randn(2, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("name", [
    pytest.param(n, marks=[pytest.mark.soak] * (n in ("shufflenet", "swin"))) for n in NETWORKS  # swin_v2 stays
])
def test_everything_is_free_and_every_cut_exact(name: str) -> None:
    model, x = built(name)
    graph = surgery.trace(model, x)
    assert {pin.reason for pin in graph.pinned} == {"model input", "model output"}, graph.summary()
    assert sum(group.kind == "head" for group in graph.groups) == NETWORKS[name][2]
    for seed in range(3):
        keep = random_keep(graph, seed)
        small = surgery.cut(model, graph, keep)
        masked = surgery.mask(model, graph, keep)
        assert surgery.check_equal(masked, small, x) < 1e-12
        with torch.no_grad():
            assert relative_error(model(x), small(x)) > 1e-3, "the cut changed nothing"
            assert small(torch.cat((x, x))).shape == (4, 10)
        assert surgery.SizeModel(graph).of(keep).params == sum(p.numel() for p in small.parameters())
        assert not any(type(module).__name__.startswith("Gated") for module in small.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_twin_computes_what_its_original_does(name: str) -> None:
    model, x = built(name)
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        expected = model(x)
        with twinned(model):
            assert relative_error(expected, model(x)) < 1e-12
    assert [type(module) for module in model.modules()] == classes


def test_a_cut_transformer_trains_and_is_stored(tmp_path: Path) -> None:
    model, x = built("vit")
    graph = surgery.trace(model, x)
    small = surgery.cut(model, graph, random_keep(graph, 0)).train()
    small(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    surgery.save(small, tmp_path / "small.safetensors")
    again = surgery.load(tmp_path / "small.safetensors", lambda: built("vit")[0]).eval()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), small.state_dict().values(), strict=True))
    assert relative_error(small.eval()(x).detach(), again(x).detach()) < 1e-13
    assert [type(m) for m in again.modules()] == [type(m) for m in small.modules()]


@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("batch_first", [False, True])
def test_plain_attention_takes_what_multi_head_attention_takes(kdim: int | None, batch_first: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=batch_first).double().eval()
    query = torch.randn(3, 5, 8, dtype=torch.float64)
    key = query if kdim is None else torch.randn(3, 5, kdim, dtype=torch.float64)
    length, batch = (5, 3) if batch_first else (3, 5)
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[:, -1] = True
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    for options in (
        {}, {"need_weights": False}, {"average_attn_weights": False}, {"key_padding_mask": padding},
        {"attn_mask": causal}, {"attn_mask": causal, "key_padding_mask": padding, "need_weights": False},
        {"attn_mask": torch.randn(batch * 2, length, length, dtype=torch.float64)},
    ):
        expected = attention(query, key, key, **options)
        with twinned(attention):
            found = attention(query, key, key, **options)
        for a, b in zip(expected, found, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-10, atol=1e-12), options


def test_every_twin_is_met() -> None:
    met = {type(module) for name in NETWORKS for module in built(name)[0].modules()}
    assert met >= set(TWINS)


def test_attention_costs_the_same_whichever_axis_the_batch_is_on() -> None:
    """One projection of one tensor, not three of three transposed ones."""

    class Net(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(3, 64), nn.Linear(64, 5)
            self.attention = nn.MultiheadAttention(64, 4, batch_first=batch_first)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            x = x if self.attention.batch_first else x.transpose(0, 1)
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.head(x.mean(1 if self.attention.batch_first else 0))

    macs = [surgery.SizeModel(surgery.trace(Net(first).eval(), torch.randn(2, 7, 3))).dense.macs for first in (0, 1)]
    assert macs[0] == macs[1]
