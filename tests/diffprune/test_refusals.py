"""What `compress` refuses or stops at: in words, and before anything is trained where it can be known before."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stripes import PLAIN, SEEN, Batches, Fixed, Small, batched
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import surgery
from diffprune import Budget, Recipe, compress
from diffprune.errors import BadBudget, BadConfig, BadData, BadModel, BudgetUnreachable, NothingToCut, TrainingDiverged


@pytest.fixture(scope="module")
def train() -> Batches:
    return batched(256, 0)


@pytest.fixture(scope="module")
def val() -> Batches:
    return batched(64, 1)


@pytest.fixture(scope="module")
def parent() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def refused(error: type[Exception], words: str, *args: Any, **options: Any) -> None:
    """`compress` raises before it trains: not one step or stage is told after the dense one."""
    told: list[dict[str, Any]] = []
    options = {"budget": Budget(macs=0.5), "epochs": 1, "on_event": told.append, **options}
    with pytest.raises(error, match=words):
        compress(*args, **options)
    assert [event for event in told if event["phase"] != "dense"] == []


def test_what_is_refused_before_any_training(parent: nn.Module, train: Batches, val: Batches) -> None:
    def once() -> Iterator[Any]:
        yield from train

    refused(NothingToCut, "no channel that may be removed", Fixed(), train, val)
    refused(BudgetUnreachable, "the least reachable is 0.0", parent, train, val, budget=Budget(macs=1e-4))
    refused(BudgetUnreachable, "smaller round_to", parent, train, val, budget=Budget(macs=0.2), round_to=16)
    refused(BadBudget, "epochs=-1", parent, train, val, epochs=-1)
    refused(BadBudget, "epochs=nan", parent, train, val, epochs=float("nan"))
    refused(BadBudget, "epochs=inf", parent, train, val, epochs=float("inf"))
    refused(BadBudget, "round_to=0", parent, train, val, round_to=0)
    refused(BadBudget, "were given with a budget of macs", parent, train, val, threads=2)
    refused(BadData, "the training data is empty", parent, [], val)
    refused(BadData, "train is a generator, which can be read only once", parent, once(), val)
    refused(BadData, "val is a list_iterator", parent, train, iter(val))
    refused(BadData, "the validation data is empty", parent, train, [])
    refused(BadData, "no labels", parent, train, [x for x, _ in val])
    refused(ValueError, "gate is one of", parent, train, val, gate="none")


class Spoiled:
    """Batches that are no numbers when they are read for the time `at`, counted from zero."""

    def __init__(self, batches: Batches, at: int) -> None:
        self.batches, self.at, self.times = batches, at, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        factor = torch.nan if self.times == self.at else 1.0
        self.times += 1
        return iter([(x * factor, y) for x, y in self.batches])


@pytest.mark.parametrize(
    ("at", "error", "words"),
    [
        (0, BadData, "computes values that are not finite"),
        (1, BadData, "statistics .* not finite"),
        (2, TrainingDiverged, "the loss is nan at step 8 of the recover phase"),
    ],
)
def test_data_that_is_no_number_stops_the_run(
    parent: nn.Module, train: Batches, val: Batches, at: int, error: type[Exception], words: str
) -> None:
    """Read for the scores, the fit and the first epoch, for the statistics after the cut, for the second epoch."""
    with pytest.raises(error, match=words):
        compress(parent, Spoiled(train, at), val, budget=Budget(macs=0.5), epochs=2, example_inputs=train[0][0])


@pytest.mark.parametrize(
    ("labels", "fact"),
    [
        (torch.full((32,), -1), "labels go from -1 to -1; the network tells 4 classes apart"),
        (torch.arange(32) % 5, "labels go from 0 to 4; the network tells 4 classes apart"),
        (torch.zeros(32), r"labels are torch.float32 of shape \(32,\) for 32 inputs and 4 classes"),
        (torch.zeros(32, 1).long(), r"labels are torch.int64 of shape \(32, 1\)"),
    ],
)
def test_labels_that_nothing_can_be_learned_from_are_refused(labels: Tensor, fact: str) -> None:
    with pytest.raises(BadData, match=fact):
        compress(PLAIN, [(SEEN[0][0], labels)], SEEN, budget=Budget(macs=0.6), epochs=1)


class Writing(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5))


def test_a_network_that_writes_into_its_input_is_refused() -> None:
    """The parent would be asked about other images than it, and validation images would change with every pass."""
    before = SEEN[0][0].clone()
    with pytest.raises(BadData, match="the network writes into its input"):
        compress(Writing(*PLAIN), SEEN, SEEN, budget=Budget(macs=0.6), epochs=1)
    assert torch.equal(SEEN[0][0], before)


def test_a_network_that_cannot_be_copied_says_so() -> None:
    model = nn.Sequential(*list(PLAIN)[:-1], nn.utils.weight_norm(nn.Linear(16, 4)))
    with pytest.raises(surgery.NotCopied, match="remove old weight norms"):
        compress(model, SEEN, SEEN, budget=Budget(macs=0.6), epochs=0)


LATE = 1000 // 32 + 1
"""Batches that calibration does not look at come behind these."""


@pytest.mark.parametrize(
    ("late", "fact"),
    [
        (torch.full((32,), 3), "labels go from 3 to 3; the network tells 3 classes apart"),
        (torch.full((32,), -100), "labels go from -100 to -100"),
        (torch.zeros(31).long(), r"labels are torch.int64 of shape \(31,\) for 32 inputs"),
        (None, r"a batch holds inputs of shape \(0, 1, 8, 8\)"),
    ],
    ids=["out of range", "ignored", "too few", "empty"],
)
def test_what_is_wrong_with_a_late_batch_is_told(
    parent: nn.Module, train: Batches, val: Batches, late: Tensor | None, fact: str
) -> None:
    images = train[0][0]
    batch = (images[:0], torch.zeros(0).long()) if late is None else (images, late)
    with pytest.raises(BadData, match=fact) as caught:
        compress(parent, [*(train * 5)[:LATE], batch], val, budget=Budget(macs=0.6), epochs=1)
    assert "the run was stopped" in str(caught.value)


def test_images_that_the_network_does_not_take(parent: nn.Module, train: Batches, val: Batches) -> None:
    doubles = [(x.double(), labels) for x, labels in train]
    colours = [(x.expand(-1, 3, 8, 8), labels) for x, labels in train]
    for given, fact in ((doubles, "in torch.float64: "), (colours, r"images of \(3, 8, 8\)")):
        with pytest.raises(BadData, match=fact):
            compress(parent, given, val, budget=Budget(macs=0.6), epochs=0)
        with pytest.raises(BadData, match=fact):
            compress(parent, train, given, budget=Budget(macs=0.6), epochs=0)
    samples: Any = TensorDataset(*train[0])
    with pytest.raises(BadData):
        compress(parent, samples, val, budget=Budget(macs=0.6), epochs=0)


@pytest.mark.parametrize(
    "given", [{"epochs": 1e308}, {"epochs": -1}, {"epochs": float("nan")}, {"round_to": 0}, {"seed": 2**70}]
)
def test_numbers_that_mean_nothing(given: dict[str, Any], parent: nn.Module, train: Batches, val: Batches) -> None:
    with pytest.raises(BadBudget, match="are asked"):
        compress(parent, train, val, budget=Budget(macs=0.6), **given)


def test_a_device_that_is_none(parent: nn.Module, train: Batches, val: Batches) -> None:
    with pytest.raises(BadConfig, match="device"):
        compress(parent, train, val, budget=Budget(macs=0.6), device="gpu")


def test_a_momentum_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum is at least 0 and below 1"):
        Recipe(momentum=1.0)


def test_a_network_spread_over_devices_is_refused(parent: nn.Module, train: Batches, val: Batches) -> None:
    with pytest.raises(BadModel, match="is in a DataParallel"):
        compress(nn.DataParallel(parent), train, val, budget=Budget(macs=0.6), epochs=0.25)
