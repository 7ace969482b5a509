"""Single weights: the search is on target, learns which matter, and what it leaves unread is cut."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock

import surgery
from diffprune.errors import NothingToCut
from diffprune.sparse import SparseModel


def data() -> tuple[Tensor, Tensor]:
    """The label is the sign of the sum of the first four of sixteen inputs."""
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    return x, (x[:, :4].sum(1) > 0).long()


def trained() -> nn.Sequential:
    torch.manual_seed(0)
    model, (x, labels) = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)), data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model


def right(model: nn.Module) -> float:
    x, labels = data()
    return float((model(x).argmax(1) == labels).float().mean())


def test_a_search_over_weights_keeps_the_accuracy_and_surgery_removes_what_is_unread() -> None:
    model, (x, labels) = trained(), data()
    sparse = SparseModel(model).train()
    weights = torch.optim.Adam(sparse.model.parameters(), 1e-3)
    gates = torch.optim.Adam([sparse.logits], 0.05)
    for step in range(200):
        share = max(0.06, 1 - step / 100)
        sparse.follow_(share)
        opened = sparse.gate.chance(sparse.logits + sparse.shift).mean()
        assert float(opened) == pytest.approx(share, rel=5e-3)
        weights.zero_grad()
        gates.zero_grad()
        F.cross_entropy(sparse(x), labels).backward()
        weights.step()
        gates.step()
    plain = sparse.folded(0.06).eval()
    left = sum(int((p != 0).sum()) for p in plain.parameters() if p.dim() > 1)
    assert left == int(0.06 * sparse.logits.numel())
    assert right(plain) > max(0.9, right(SparseModel(model).folded(0.06)) + 0.05)
    graph = surgery.trace(plain, x[:2])
    small = surgery.cut(plain, graph, surgery.unread(plain, graph))
    assert small[0].out_features < 20
    torch.testing.assert_close(small(x), plain(x))


def test_the_input_model_is_left_alone_and_open_gates_change_nothing() -> None:
    model, (x, _) = trained(), data()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sparse = SparseModel(model.eval())
    sparse.shift.fill_(10.0)
    assert torch.equal(sparse(x), model(x))
    sparse.follow_(0.5)
    assert not torch.equal(sparse(x), model(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_scales_tokens_and_positions_are_no_weights() -> None:
    """They start small: by magnitude all scales of a ConvNeXt would go, and with them every branch."""
    model = nn.ModuleDict({
        "block": CNBlock(8, 1e-6, 0.0),
        "attention": nn.MultiheadAttention(8, 2),
        "cells": nn.LSTM(8, 4),
    })
    model.register_parameter("token", nn.Parameter(torch.randn(1, 1, 8)))
    model.register_parameter("positions", nn.Parameter(torch.randn(1, 16, 8)))
    assert set(SparseModel(model)._shapes) == {
        "block.block.0.weight", "block.block.3.weight", "block.block.5.weight",
        "attention.in_proj_weight", "attention.out_proj.weight", "cells.weight_ih_l0", "cells.weight_hh_l0",
    }  # fmt: skip
    folded = SparseModel(model).folded(0.2)
    for name in ("token", "positions", "block.layer_scale"):
        assert torch.equal(folded.get_parameter(name), model.get_parameter(name))


def test_without_weights_it_is_refused() -> None:
    with pytest.raises(NothingToCut, match="no weight matrix"):
        SparseModel(nn.Sequential(nn.ReLU()))


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"gate is one of diffprune, .*; got 'soft'"):
        SparseModel(torch.nn.Linear(3, 3), gate="soft")


@pytest.mark.parametrize("gate", ["diffprune", "hard-concrete"])
def test_what_is_folded_is_what_the_gates_computed(gate: str) -> None:
    model, (x, _) = trained(), data()
    sparse = SparseModel(model, gate=gate).eval()
    sparse.follow_(0.4)
    opened = sparse.gate.hard(sparse.logits + sparse.shift) > 0
    plain = sparse.folded(float(opened.sum() + 0.5) / len(opened))
    torch.testing.assert_close(plain(x), sparse(x))


def test_a_layer_of_zeros_leaves_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[2].weight)
    sparse = SparseModel(model)
    assert sparse.logits.isfinite().all()
    plain = sparse.folded(0.5)
    assert int((plain[0].weight != 0).sum()) == 28, "zeros come last"


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share is above 0 and at most 1"):
        SparseModel(nn.Linear(4, 4)).folded(share)
