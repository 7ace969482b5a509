"""A gated norm with all channels open is torch's own, in every precision: what it gives, and the dtype of that."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import surgery
from surgery.norms import gate_norm_

NORMS = {"layer": nn.LayerNorm(16), "rms": nn.RMSNorm(16), "group": nn.GroupNorm(1, 16)}
SMALL = 1e-3
"""Of such values the statistics show what a norm adds to them by default."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_it_is_torchs_own(name: str, autocast: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (SMALL * torch.randn(8, 16)).to(dtype)
    plain = copy.deepcopy(NORMS[name]) if autocast else copy.deepcopy(NORMS[name]).to(dtype)
    gated = copy.deepcopy(plain)
    gate_norm_(gated, torch.ones(16))
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    with torch.autocast("cpu", half) if autocast else nullcontext():
        expected, found = plain(x), gated(x)
    assert found.dtype == expected.dtype
    assert expected.std() > 0.01
    assert (found.float() - expected.float()).abs().max() <= 2 * torch.finfo(expected.dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_masked_is_what_is_cut_without_an_eps_of_ones_own(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 4)).eval().to(dtype)
    x = (SMALL * torch.randn(4, 8)).to(dtype)
    graph = surgery.trace(model, x)
    keep = {group.name: torch.arange(group.units) % 2 == 0 for group in graph.groups}
    assert keep
    masked, small = surgery.mask(model, graph, keep), surgery.cut(model, graph, keep)
    assert surgery.check_equal(masked, small, x) <= 4 * torch.finfo(dtype).eps
