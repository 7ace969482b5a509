"""Gates under autocast and gradient accumulation: they stay float32, and small batches add up to a large one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import traced

import surgery
from diffprune import Budget, GatedModel, MeanCentred, Recipe, attach
from diffprune.feeding import endless
from diffprune.search import follow_, search_
from diffprune.sparse import SparseModel
from diffprune.training import fit_

DTYPES = (torch.bfloat16, torch.float16)


def prepared(name: str = "residual") -> tuple[GatedModel, Tensor]:
    model, graph, x = traced(name)
    gated = attach(model.float(), graph, gate=MeanCentred(stochastic=False)).train()
    gated.logits.data.copy_(torch.randn(len(gated.logits), generator=torch.Generator().manual_seed(1)) + 0.5)
    return gated, x.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["residual", "layer_norm_mlp", "multihead_attention"])
def test_under_autocast_gates_and_their_gradients_are_float32_and_close(name: str, dtype: torch.dtype) -> None:
    gated, x = prepared(name)
    with torch.autocast("cpu", dtype):
        output = gated(x)
        assert gated.sample().dtype == torch.float32
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (output.float() * direction).sum().backward()
    assert gated.logits.grad is not None
    half, half_output = gated.logits.grad.clone(), output.detach().float()
    assert half.dtype == torch.float32
    gated.zero_grad()
    (gated(x) * direction).sum().backward()
    scale = gated.logits.grad.abs().max()
    assert scale > 0
    assert (half - gated.logits.grad).abs().max() < 0.1 * scale
    assert (half_output - gated(x)).abs().max() < 0.1 * half_output.abs().max()


def test_half_batches_add_up_to_the_gradient_of_the_whole() -> None:
    gated, x = prepared("layer_norm_mlp")  # without BatchNorm, whose statistics are those of its batch
    x = torch.cat([x, x.flip(0) * 0.5])
    target = torch.randn(gated(x).shape, generator=torch.Generator().manual_seed(0))
    F.mse_loss(gated(x), target).backward()
    whole = {name: p.grad.clone() for name, p in gated.named_parameters() if p.grad is not None}
    gated.zero_grad()
    for part, wanted in zip(x.chunk(2), target.chunk(2), strict=True):
        (F.mse_loss(gated(part), wanted) / 2).backward()
    assert "logits" in whole
    for name, gradient in whole.items():
        torch.testing.assert_close(dict(gated.named_parameters())[name].grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_a_users_loop_with_autocast_accumulation_and_scaling(dtype: torch.dtype) -> None:
    gated, x = prepared()
    budget, scaler = Budget(macs=0.6), torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=64.0)
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.1)
    before = gated.logits.detach().clone()
    for _ in range(2):
        follow_(gated, budget, budget.share)
        for part in (x, x * 0.5):
            with torch.autocast("cpu", dtype):
                loss = gated(part).square().mean()
            scaler.scale(loss / 2).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert gated.logits.isfinite().all()
    assert not torch.equal(gated.logits, before)
    assert all(p.dtype == torch.float32 for p in gated.parameters())


@pytest.mark.parametrize("make", [lambda model, graph: attach(model, graph), lambda model, graph: SparseModel(model)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_gates_stay_float32_where_the_network_becomes_half(dtype: torch.dtype, make: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    gated = make(model, surgery.trace(model, x))
    before = gated.logits.detach().clone()
    gated = gated.to(dtype)
    assert gated.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(gated.logits.float(), before)
    assert {p.dtype for p in gated.model.parameters()} == {dtype}
    optimizer = torch.optim.SGD([gated.logits], lr=1e-4)
    gated.train()(x.to(dtype)).float().sum().backward()
    optimizer.step()
    assert not torch.equal(gated.logits.float(), before), "so small a step is lost in half precision"


@pytest.mark.parametrize("searching", [True, False], ids=["search", "recover"])
def test_a_recipe_in_bfloat16_trains_close_to_float32_and_keeps_weights_in_it(searching: bool) -> None:
    """Close, but not the same: the networks did run in bfloat16."""
    ends = {}
    for precision in ("float32", "bfloat16"):
        gated, x = prepared("layer_norm_mlp")
        start = torch.cat([p.detach().flatten() for p in gated.parameters()])
        parent, _, _ = traced("layer_norm_mlp")
        labels = torch.zeros(len(x), dtype=torch.long)
        recipe, batches = Recipe(lr=0.05, precision=precision), endless([(x, labels)])
        seen: list[dict[str, float]] = []
        if searching:
            search_(
                gated, batches, Budget(macs=0.6), recipe, steps=3, total=3, parent=parent.float(), on_event=seen.append
            )
        else:
            model = gated.folded(torch.ones(len(gated.gate_of), dtype=torch.bool))
            fit_(
                model, batches, recipe, steps=range(3), total=3, parent=parent.float(), phase="x", on_event=seen.append
            )
        trained = gated if searching else model
        assert all(p.dtype == torch.float32 for p in trained.parameters())
        ends[precision] = torch.cat([p.detach().flatten() for p in trained.parameters()])
    moved = (ends["float32"] - start[-len(ends["float32"]):]).norm()
    apart = (ends["bfloat16"] - ends["float32"]).norm()
    assert 0 < apart < 0.1 * moved


def test_a_precision_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="precision is one of float32, bfloat16; got 'bf16'"):
        Recipe(precision="bf16")  # type: ignore[arg-type]


def test_a_loss_is_taken_in_float32() -> None:
    output, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    half = output.bfloat16()
    for parent in (None, half.flip(0)):
        loss = Recipe().loss(half, labels, parent)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, Recipe().loss(half.float(), labels, None if parent is None else parent.float()))
