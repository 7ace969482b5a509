"""Scores: relative norms of what writes and reads a unit, in an order that does not depend on where it lies."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, randomised

import surgery
from diffprune.score import as_logits, magnitude
from surgery import ChannelGraph, SizeModel

SPREAD = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def traced(name: str) -> tuple[nn.Module, ChannelGraph, Any]:
    model, x = randomised(ZOO[name].build()).double().eval(), ZOO[name].example()
    return model, surgery.trace(model, x), x


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.free])
def test_one_positive_score_per_unit(name: str) -> None:
    model, graph, _ = traced(name)
    scores = magnitude(model, graph)
    assert scores.shape == (graph.units,)
    assert scores.dtype == torch.float64
    assert scores.min() > 0
    for part in scores.split([group.units for group in graph.groups]):
        assert part.mean() == pytest.approx(1), "relative to the mean of the group"
    assert len(scores.unique()) == graph.units


def test_by_hand() -> None:
    model, graph, _ = traced("flatten_to_linear")
    writer, reader = model.get_parameter("a.weight"), model.get_parameter("head.weight")
    wrote = writer.flatten(1).norm(dim=1)
    read = reader.unflatten(1, (6, 36)).movedim(1, 0).flatten(1).norm(dim=1)
    expected = (wrote / wrote.mean() + read / read.mean()) / 2
    assert torch.allclose(magnitude(model, graph), expected.detach(), rtol=1e-12)


def test_scores_follow_their_units() -> None:
    model, graph, x = traced("residual")
    before = SizeModel(graph).keep(magnitude(model, graph))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    output = model(x)
    with torch.no_grad():
        for name, axis in (("a.weight", 0), ("a.bias", 0), ("b.weight", 1)):
            weight = model.get_parameter(name)
            weight.copy_(weight.index_select(axis, order))
    assert torch.allclose(model(x), output, rtol=1e-10)
    after = SizeModel(graph).keep(magnitude(model, graph))
    assert torch.allclose(after["a"], before["a"][order], rtol=1e-12)
    assert torch.allclose(after["stem.0"], before["stem.0"], rtol=1e-12)
    assert not torch.allclose(after["a"], before["a"])


def test_the_scale_of_a_layer_does_not_count() -> None:
    model, graph, _ = traced("residual")
    before = magnitude(model, graph)
    with torch.no_grad():
        model.get_parameter("a.weight").mul_(100)
    assert torch.allclose(magnitude(model, graph), before, rtol=1e-10)


def test_a_dead_unit_comes_last_and_stays_a_number() -> None:
    model, graph, _ = traced("plain")
    with torch.no_grad():
        for name, axis in (("0.weight", 0), ("3.weight", 1)):
            model.get_parameter(name).select(axis, 5).zero_()
    scores = magnitude(model, graph)
    assert scores[5] == 0
    assert scores.argmin() == 5
    logits = as_logits(scores)
    assert logits.isfinite().all()
    assert logits.argmin() == 5
    assert torch.equal(logits.argsort(), scores.argsort())


def test_a_layer_of_zeros_scores_zero_throughout() -> None:
    model, graph, _ = traced("plain")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    scores = magnitude(model, graph)
    assert torch.equal(scores, torch.zeros_like(scores))
    assert torch.equal(as_logits(scores), torch.zeros(graph.units))


def test_a_score_far_from_the_others_does_not_run_away() -> None:
    logits = as_logits(torch.cat([SPREAD + 0.1, torch.zeros(1)]))
    assert logits[-1] == -4
    assert logits[:-1].min() > -2


@pytest.mark.parametrize("scores", [SPREAD + 0.1, (SPREAD + 0.1) * 1e-3, torch.full((7,), 3.0), torch.ones(1)])
def test_logits_keep_the_order_and_lie_around_zero(scores: Tensor) -> None:
    logits = as_logits(scores)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert logits.abs().max() <= 4
    assert logits.mean().abs() < 1e-5
    if len(scores.unique()) > 1:
        assert logits.std() == pytest.approx(1, abs=0.05)
        assert torch.equal(logits.argsort(), scores.argsort())
    else:
        assert logits.abs().max() < 1e-5
