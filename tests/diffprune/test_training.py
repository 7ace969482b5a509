"""Training pieces: the schedule, the loss by hand, what a batch may be, and a stop before weights are spoiled."""

from collections.abc import Iterator
from itertools import islice
from math import inf, log, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diffprune import Budget, compress
from diffprune.data.own import from_user
from diffprune.errors import BadData, TrainingDiverged
from diffprune.feeding import endless, unpack
from diffprune.training import TRUST, Recipe, fit_, step_

CPU = torch.device("cpu")


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    recipe = Recipe(lr=0.1, warm_up=0.2)
    rates = [recipe.rate(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1 / 21)
    assert rates[20] == max(rates) == pytest.approx(0.1)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[60] == pytest.approx(0.05)
    assert rates[100] == pytest.approx(0)
    assert min(rates[:100]) > 0
    assert Recipe(lr=0.1, warm_up=0.0).rate(0, 1) == pytest.approx(0.1)


def test_the_optimizer_takes_the_recipe_and_leaves_frozen_parameters_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    (group,) = Recipe(lr=0.3, momentum=0.8, weight_decay=0.01).optimizer(model.parameters()).param_groups
    assert [group[key] for key in ("lr", "momentum", "weight_decay", "nesterov")] == [0.3, 0.8, 0.01, True]
    assert {id(p) for p in group["params"]} == {id(p) for p in model[1].parameters()}
    assert Recipe().optimizer(model[0].parameters()).param_groups[0]["params"] == []


def by_hand(output: Tensor, labels: Tensor, parent: Tensor, t: float) -> tuple[float, float]:
    """Cross-entropy, and t^2 * KL(parent || output) at temperature t, as plain sums."""
    n = len(output)
    hard = -sum(output[i].exp()[labels[i]].div(output[i].exp().sum()).log().item() for i in range(n)) / n
    p, q = ((x / t).exp() / (x / t).exp().sum(1, keepdim=True) for x in (parent, output))
    soft = sum(
        p[i, j].item() * (log(p[i, j].item()) - log(q[i, j].item())) for i in range(n) for j in range(output.shape[1])
    )
    return hard, t**2 * soft / n


def test_the_loss_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    output, parent = (torch.randn(6, 4, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    recipe = Recipe(distill=0.7, temperature=3.0)
    hard, soft = by_hand(output, labels, parent, 3.0)
    assert hard > 0.1
    assert soft > 0.1
    assert recipe.loss(output, labels, None).item() == pytest.approx(hard, rel=1e-12)
    assert recipe.loss(output, None, parent).item() == pytest.approx(soft, rel=1e-12)
    assert recipe.loss(output, labels, parent).item() == pytest.approx(0.3 * hard + 0.7 * soft, rel=1e-12)
    assert recipe.loss(parent, None, parent).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("output", "given"),
    [((torch.zeros(2, 3), torch.zeros(2, 3)), "tuple"), ({"out": torch.zeros(2, 3)}, "dict"),
     (torch.zeros(2, 3, 1), r"a tensor of shape \(2, 3, 1\)")],
)
def test_what_is_no_logits_is_refused(output: Any, given: str) -> None:
    with pytest.raises(BadData, match=f"the network returns {given}"):
        Recipe().loss(output, torch.zeros(2, dtype=torch.long), None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_are_integers_of_any_size(dtype: torch.dtype) -> None:
    labels = unpack((torch.zeros(2, 3), torch.tensor([1, 2], dtype=dtype)), torch.device("cpu"))[1]
    assert labels is not None
    assert labels.tolist() == [1, 2]
    Recipe().loss(torch.zeros(2, 3), labels, None)


def test_a_loss_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="without labels a parent to imitate is needed"):
        Recipe().loss(torch.zeros(2, 3), None, None)


def test_what_a_batch_may_be() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2)
    for batch in (x, (x,), [x], (x, None)):
        inputs, labels = unpack(batch, CPU)
        assert inputs is x
        assert labels is None
    for batch in ((x, y), [x, y]):
        assert unpack(batch, CPU) == (x, y)
    (loaded,) = DataLoader(TensorDataset(x), batch_size=2)
    assert unpack(loaded, CPU)[0].shape == (2, 3)
    moved = unpack((x, y), torch.device("meta"))
    assert [t.device.type for t in moved if t is not None] == ["meta", "meta"]


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"x": 1}, "a batch is dict"),
        ((torch.zeros(1), torch.zeros(1), torch.zeros(1)), "a batch is tuple of Tensor, Tensor, Tensor"),
        ((torch.zeros(1), [1]), "a batch is tuple of Tensor, list"),
        ([], "a batch is list of nothing"),
    ],
)
def test_what_a_batch_may_not_be(batch: Any, found: str) -> None:
    with pytest.raises(BadData, match=found):
        unpack(batch, CPU)


def test_one_epoch_follows_the_other() -> None:
    assert list(islice(endless([1, 2, 3]), 7)) == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("batches", [[], iter([])])
def test_batches_that_are_empty_or_used_up_are_refused(batches: Any) -> None:
    with pytest.raises(BadData, match="empty, or can be read only once"):
        next(endless(batches))


def test_batches_that_end_for_good_are_refused_at_the_second_epoch() -> None:
    once = endless(iter([1, 2]))
    assert [next(once), next(once)] == [1, 2]
    with pytest.raises(BadData, match="read only once"):
        next(once)


@pytest.mark.parametrize("value", [nan, inf])
def test_a_loss_that_is_no_number_stops_before_it_spoils_the_weights(value: float) -> None:
    model = nn.Linear(2, 2)
    before = [p.clone() for p in model.parameters()]
    optimizer = Recipe(lr=1.0).optimizer(model.parameters())
    with pytest.raises(TrainingDiverged, match=f"the loss is {value} at step 7 of the search phase"):
        step_(model, [optimizer], model(torch.ones(1, 2)).square().sum() * value, phase="search", step=7)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def task() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return model, [*zip(x.split(16), (x[:, 0] > 0).long().split(16), strict=True)]


def fit(model: nn.Module, batches: Iterator[Any], **more: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    options = {"steps": range(3, 40), "total": 40, "phase": "recover", **more}
    fit_(model, batches, Recipe(lr=0.1), on_event=events.append, **options)
    return events


def test_training_lowers_the_loss_and_tells_of_every_step() -> None:
    model, batches = task()
    events = fit(model.eval(), endless(batches))
    assert [event["step"] for event in events] == list(range(4, 41))
    assert {event["phase"] for event in events} == {"recover"}
    assert {event["steps"] for event in events} == {40}
    assert sum(e["loss"] for e in events[-4:]) < 0.5 * sum(e["loss"] for e in events[:4])
    assert model.training
    assert model.get_buffer("1.num_batches_tracked") == 37


def test_one_step_by_hand() -> None:
    """Nesterov's first step is lr * (1 + momentum) * gradient, with the decay in the gradient."""
    model, batches = nn.Linear(4, 2), task()[1]
    weight = model.weight.detach().clone()
    recipe = Recipe(lr=0.1)
    (gradient,) = torch.autograd.grad(recipe.loss(model(batches[0][0]), batches[0][1], None), model.weight)
    fit_(model, endless(batches), recipe, steps=range(5, 6), total=40, phase="recover", on_event=lambda e: None)
    expected = weight - recipe.rate(5, 40) * 1.9 * (gradient + 5e-4 * weight)
    assert torch.allclose(model.weight, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(model.weight, weight)


def test_imitation_needs_no_labels_and_leaves_the_parent_alone() -> None:
    model, batches = task()
    parent = task()[0].eval()
    fit(parent, endless(batches))
    parent.eval().zero_grad(set_to_none=True)
    before = {k: v.clone() for k, v in parent.state_dict().items()}
    events = fit(model, endless([x for x, _ in batches]), parent=parent)
    assert events[-1]["loss"] < 0.3 * events[0]["loss"]
    assert all(torch.equal(before[k], v) for k, v in parent.state_dict().items())
    assert all(p.grad is None for p in parent.parameters())


def test_frozen_parameters_stay_frozen() -> None:
    model, batches = task()
    model[0].requires_grad_(False)  # type: ignore[index]
    before = [p.clone() for p in model.parameters()]
    fit(model, endless(batches))
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert same == [True, True, False, False, False, False]


def test_no_steps_train_nothing() -> None:
    model, _ = task()
    assert fit(model.requires_grad_(False), endless([]), steps=range(40, 40)) == []


def test_weights_that_overflow_in_eval_mode_have_diverged() -> None:
    model, batches = task()
    model.get_buffer("1.running_var").fill_(nan)
    with pytest.raises(TrainingDiverged, match="not finite after the recover phase"):
        fit(model, endless(batches), steps=range(39, 40))


def test_with_hints_no_gradient_is_longer_than_the_first() -> None:
    class Steeper(nn.Linear):
        """Ten times steeper at every call."""

        calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(inputs) * 10**self.calls

    def lengths(hint: Any, clip: float | None = None) -> list[float]:
        torch.manual_seed(0)
        model, moved = Steeper(3, 2, bias=False), []
        batches = iter([(torch.ones(4, 3), torch.tensor([0, 1, 0, 0]))] * 3)
        recipe = Recipe(lr=1e-6, weight_decay=0.0, distill=0.0, clip=clip)
        fit_(
            model, batches, recipe, steps=range(3), total=1000, hint=hint, phase="recover",
            on_event=lambda event: moved.append(model.weight.grad.norm().item()),
        )  # fmt: skip
        return moved

    free, held = lengths(None), lengths(lambda: torch.zeros(()))
    assert free[0] == held[0]
    assert min(free[1:]) > 5 * free[0]
    assert max(held[1:]) <= 1.001 * held[0]
    clipped = lengths(None, clip=2 * free[0])
    assert clipped[0] == free[0]
    assert clipped[1:] == pytest.approx([2 * free[0]] * 2, rel=1e-4)


class Endless:
    """A loader that never ends."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.randn(2, 3, 8, 8), torch.tensor([0, 1])


def test_data_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprune.feeding.MOST_BATCHES", 50)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    few = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))] * 3
    for train, val in ((Endless(), few), (few, Endless())):
        with pytest.raises(BadData, match="does not end after 50 batches"):
            compress(model, train, val, budget=Budget(macs=0.5), epochs=1)
    monkeypatch.setattr("diffprune.data.own.imported", lambda *_: lambda: (Endless(), few))
    with pytest.raises(BadData, match="does not end after 50 batches"):
        from_user("their:data", None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("distill", 2.0), ("temperature", 0.0), ("lr", -0.1), ("lr", float("nan")), ("hints", -1.0), ("clip", 0.0),
        ("clip", -1.0), ("momentum", 2.0), ("warm_up", 3.0), ("weight_decay", -1e-4),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_train_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is .* 0.*; got {value}"):
        Recipe(**{name: value})


def test_a_step_of_a_recovery_moves_the_weights_by_little_of_their_length() -> None:
    def moved(hinted: bool) -> float:
        torch.manual_seed(0)
        model, batch = nn.Linear(4, 3), (torch.randn(8, 4), torch.arange(8) % 3)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        steep = (lambda: 1e4 * model.weight.square().sum()) if hinted else None
        recipe = Recipe(distill=0.0, hints=1.0, weight_decay=0.0, warm_up=0.0, lr=10.0)
        fit_(model, iter([batch]), recipe, steps=range(1), total=10, hint=steep, phase="recover")
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        return float((after - before).norm() / before.norm())

    assert 0 < moved(True) <= 1.91 * 0.1 * TRUST, "the first step of Nesterov's momentum of 0.9"
    assert moved(False) > 1, "that is for recoveries, which have hints"
