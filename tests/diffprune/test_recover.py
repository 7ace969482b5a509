"""Recalibration against closed forms, and accuracy that is counted on what it says."""

from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffprune.errors import BadData
from diffprune.recover import accuracy, recalibrate_
from diffprune.training import forward


def batches(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 5, 5, generator=generator, dtype=torch.float64) * (i + 1) + i for i in range(count)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.Conv2d(4, 2, 1),
        nn.BatchNorm2d(2, momentum=None), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(),
    )  # fmt: skip
    return model.double()


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel."""
    return x.mean((0, 2, 3)), x.movedim(1, 0).flatten(1).var(1, unbiased=True)


def test_one_batch_gives_its_own_statistics_layer_after_layer() -> None:
    model, (x,) = network(), batches(1)
    recalibrate_(model, [(x, None)])
    with torch.no_grad():
        first = model[0](x)
        mean, var = statistics(first)
        assert torch.allclose(model[1].running_mean, mean, rtol=1e-12)
        assert torch.allclose(model[1].running_var, var, rtol=1e-12)
        # what the second layer saw: the first normalised by its batch, dropout off
        normal = (first - mean[:, None, None]) / (first.var((0, 2, 3), unbiased=False)[:, None, None] + 1e-5).sqrt()
        mean, var = statistics(model[3](normal))
        assert torch.allclose(model[4].running_mean, mean, rtol=1e-9)
        assert torch.allclose(model[4].running_var, var, rtol=1e-9)


def test_several_batches_count_alike_up_to_the_limit() -> None:
    model, all_ = network(), batches(5)
    recalibrate_(model, all_, limit=3)
    with torch.no_grad():
        parts = [statistics(model[0](x)) for x in all_]
    for found, index in ((model[1].running_mean, 0), (model[1].running_var, 1)):
        assert torch.allclose(found, torch.stack([p[index] for p in parts[:3]]).mean(0), rtol=1e-12)
        assert not torch.allclose(found, torch.stack([p[index] for p in parts]).mean(0), rtol=1e-2)
    assert model[1].num_batches_tracked == 3


def test_old_statistics_are_forgotten() -> None:
    model, other = network(), network()
    model(batches(1, seed=9)[0] + 100)  # statistics, and a count of batches, from other data
    recalibrate_(model, batches(3))
    recalibrate_(other, batches(3))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_momentum_modes_and_weights_come_back(training: bool) -> None:
    model = network().train(training)
    model[4].train(not training)
    before = [m.training for m in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    recalibrate_(model, batches(2))
    assert [m.training for m in model.modules()] == before
    assert (model[1].momentum, model[4].momentum) == (0.3, None)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_momentum_comes_back_from_a_batch_that_does_not_fit() -> None:
    model = network().eval()
    with pytest.raises(RuntimeError, match="channels"):
        recalibrate_(model, [batches(1)[0][:, :2]])
    assert model[1].momentum == 0.3
    assert not model[1].training


def test_without_batches_nothing_is_reset() -> None:
    model = network()
    model[1].running_mean.fill_(7)
    with pytest.raises(BadData, match="no batch to take statistics from"):
        recalibrate_(model, [])
    assert model[1].running_mean.eq(7).all()
    assert model[1].momentum == 0.3


class Frozen(nn.BatchNorm2d):
    """Stays in eval mode, as frozen ones are often written."""

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_norm_that_does_not_run_or_stays_in_eval_mode_keeps_its_statistics(frozen: bool) -> None:
    model = network()
    norm = model[1] = Frozen(4).double() if frozen else model[1]
    model.spare = norm if frozen else nn.BatchNorm2d(3).double()
    model.forward = lambda x: nn.Sequential(*list(model)[:7])(x)  # which leaves the spare one out
    model.spare.running_mean.fill_(3), model.spare.running_var.fill_(5)
    recalibrate_(model, batches(2))
    assert model.spare.running_mean.eq(3).all()
    assert model.spare.running_var.eq(5).all()
    assert model[4].running_mean.ne(0).any()


@pytest.mark.parametrize("value", [nan, inf])
def test_statistics_that_are_no_numbers_are_refused(value: float) -> None:
    first, second = batches(2)
    second[0, 0, 0, 0] = value
    with pytest.raises(BadData, match="the batches give statistics that are not finite"):
        recalibrate_(network(), [first, second])


def test_a_batch_of_one_that_has_no_variance_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for given in ([torch.randn(4, 3), torch.randn(1, 3)], [torch.randn(1, 3)]):
        with pytest.raises(BadData, match="no statistics of a batch of 1"):
            recalibrate_(model, given)
    with pytest.raises(ValueError, match="another one"):
        forward(Wrong(), torch.zeros(1))


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("another one")


def test_without_batch_norm_nothing_is_read() -> None:
    recalibrate_(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), iter([]))


class Threshold(nn.Module):
    """Class 1 for positive numbers in eval mode, always class 0 in training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(x), x * self.scale - 9 * self.training], 1)


def test_accuracy_counts_every_example_once_in_eval_mode() -> None:
    model = Threshold().train()
    parts = [(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1, 0, 0])), (torch.tensor([-3.0]), torch.tensor([1]))]
    assert accuracy(model, parts) == (0.5, 4)
    assert accuracy(model, parts[:1]) == (2 / 3, 3)
    assert model.training


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([torch.ones(2)], "the validation batches have no labels"),
        ([(torch.ones(2), None)], "the validation batches have no labels"),
        ([], "the validation data is empty"),
        ([(torch.ones(2), torch.ones(2, 1).long())], r"labels have shape \(2, 1\) for outputs of shape \(2, 2\)"),
        ([(torch.ones(2), torch.ones(2, 2))], r"labels have shape \(2, 2\)"),
        ([(torch.ones(2), torch.tensor([0, 2]))], "labels go from 0 to 2; the network tells 2 classes apart"),
        ([(torch.ones(2), torch.tensor([0, -1]))], "labels go from -1 to 0"),
        ([(torch.tensor([1.0, nan]), torch.ones(2).long())], "not finite"),
        ([(torch.tensor([1.0, inf]), torch.ones(2).long())], "not finite"),
    ],
)
def test_an_accuracy_that_would_mean_nothing_is_refused(given: Any, words: str) -> None:
    with pytest.raises(BadData, match=words):
        accuracy(Threshold(), given)
