"""Scores: shares in what readers compute, in an order that does not depend on where a unit lies."""


import pytest
import torch
from torch import Tensor
from zoo import ZOO, traced

from diffprune.budget import Budget
from diffprune.score import as_logits, contribution, per_cost
from surgery import SizeModel

SPREAD = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.free])
def test_one_positive_score_per_unit(name: str) -> None:
    model, graph, x = traced(name)
    scores = contribution(model, graph, x)
    assert scores.shape == (graph.units,)
    assert scores.dtype == torch.float64
    assert scores.min() >= 0
    for group, part in zip(graph.groups, scores.split([group.units for group in graph.groups]), strict=True):
        assert 0 < part.sum() <= len(group.readers) + 1e-9, "at most the whole of every reader"


@pytest.mark.parametrize("name", ["flatten_to_linear", "grouped", "transposed", "concat_then_add"])
def test_energy_is_the_variance_that_a_unit_alone_gives_to_its_readers(name: str) -> None:
    """With inputs independent in space and channel, the closed form equals the measured variance of each unit alone."""
    model, graph, x = traced(name)
    group = next(g for g in graph.groups if len(g.readers) == 1)
    slot = group.readers[0]
    reader = next(m for m in model.modules() if getattr(m, "weight", None) is model.get_parameter(slot.tensor))
    seen: list[Tensor] = []
    hook = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    scores = SizeModel(graph).keep  # the flat order
    with torch.no_grad():
        model(x)
    hook.remove()
    weight, axis = reader.weight.detach(), slot.axis
    channels = seen[0].movedim(-1 if weight.dim() == 2 else 1, 0).flatten(1)
    period = weight.shape[axis]
    by_hand = torch.zeros(period, dtype=torch.float64)
    for channel in range(len(channels)):
        block = channel // period
        rows = weight.shape[0] // (len(channels) // period)
        used = weight.select(axis, channel % period)
        used = used[block * rows : (block + 1) * rows] if axis == 1 else used
        by_hand[channel % period] += channels[channel].var(correction=0) * used.square().sum()
    expected = by_hand[slot.positions].sum(1) / by_hand.sum()
    found = scores(contribution(model, graph, x))[group.name]
    assert torch.allclose(found, expected, rtol=1e-10)


def test_a_unit_that_varies_nothing_in_its_readers_scores_zero() -> None:
    model, graph, x = traced("plain")
    with torch.no_grad():
        model.get_parameter("0.weight")[2].zero_()  # its channel is a constant, whatever its bias
    scores = contribution(model, graph, x)
    assert scores[2] == 0
    assert (scores[:2] > 0).all()


def test_what_a_removal_saves_divides_the_score() -> None:
    _, graph, _ = traced("residual")
    size, budget = SizeModel(graph), Budget(macs=0.5)
    ones = torch.ones(graph.units, dtype=torch.float64)
    divided = size.keep(per_cost(ones, budget, size))
    for group in graph.groups:
        flags = {g.name: torch.full((g.units,), float(g.name != group.name)) for g in graph.groups}
        without = torch.cat([flags[g.name] for g in graph.groups])
        saved = 1 - float(size.macs(without)) / size.dense.macs
        assert torch.allclose(divided[group.name], torch.full((group.units,), group.units / saved).double())


def test_scores_follow_their_units() -> None:
    model, graph, x = traced("residual")
    before = SizeModel(graph).keep(contribution(model, graph, x))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    output = model(x)
    with torch.no_grad():
        for name, axis in (("a.weight", 0), ("a.bias", 0), ("b.weight", 1)):
            weight = model.get_parameter(name)
            weight.copy_(weight.index_select(axis, order))
    assert torch.allclose(model(x), output, rtol=1e-10)
    after = SizeModel(graph).keep(contribution(model, graph, x))
    assert torch.allclose(after["a"], before["a"][order], rtol=1e-12)
    assert torch.allclose(after["stem.0"], before["stem.0"], rtol=1e-12)
    assert not torch.allclose(after["a"], before["a"])


def test_the_scale_of_a_reader_does_not_count() -> None:
    model, graph, x = traced("plain")
    before = contribution(model, graph, x)
    with torch.no_grad():
        model.get_parameter("3.weight").mul_(100)
    assert torch.allclose(contribution(model, graph, x)[:8], before[:8], rtol=1e-10)


def test_a_dead_unit_comes_last_and_stays_a_number() -> None:
    model, graph, x = traced("plain")
    with torch.no_grad():
        for name, axis in (("0.weight", 0), ("3.weight", 1)):
            model.get_parameter(name).select(axis, 5).zero_()
    scores = contribution(model, graph, x)
    assert scores[5] == 0
    assert scores.argmin() == 5
    logits = as_logits(scores)
    assert logits.isfinite().all()
    assert logits.argmin() == 5
    assert torch.equal(logits.argsort(), scores.argsort())


def test_a_layer_of_zeros_scores_zero_throughout() -> None:
    model, graph, x = traced("plain")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    scores = contribution(model, graph, x)
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


def test_logits_do_not_depend_on_the_scale_of_scores() -> None:
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(as_logits(scores * 1e-12), as_logits(scores), atol=1e-4)
    assert as_logits(torch.zeros(3)).tolist() == [0, 0, 0]
