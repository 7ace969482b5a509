"""The search: on target at every step, moved by the data, nothing touched that is not its own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from diffprune.budget import Budget
from diffprune.errors import TrainingDiverged
from diffprune.feeding import endless
from diffprune.gated import GatedModel, attach
from diffprune.gates import MeanCentred
from diffprune.search import RAMP, follow_, search_
from diffprune.training import Recipe


class Useful(nn.Sequential):
    """16 hidden units of which the first 8 carry the answer; the others carry noise of the same size."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16, bias=False), nn.Identity(), nn.Linear(16, 2, bias=False))
        with torch.no_grad():
            self[0].weight.copy_(torch.eye(16))
            self[2].weight.copy_(torch.tensor([[-1.0] * 8 + [0.0] * 8, [1.0] * 8 + [0.0] * 8]))
            self[2].weight[:, 8:].copy_(torch.tensor([[1.0, -1.0] * 4, [1.0, -1.0] * 4]) * 1.4)


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (512,), generator=generator)
    x = torch.randn(512, 16, generator=generator)
    x[:, :8] = 0.3 * x[:, :8] + (2 * labels[:, None] - 1)
    return [*zip(x.split(32), labels.split(32), strict=True)]


def searched(
    model: nn.Module, budget: Budget, steps: int = 40, gate: str = "diffprune", seed: int = 0, **more: Any
) -> tuple[GatedModel, list[dict[str, Any]]]:
    graph = surgery.trace(model, torch.randn(2, 16))
    gated, events = attach(model, graph, gate=gate), []
    torch.manual_seed(seed)
    options: dict[str, Any] = {"steps": steps, "total": 4 * steps, "parent": None, "on_event": events.append, **more}
    search_(gated, endless(data()), budget, Recipe(), **options)
    return gated, events


def expected(gated: GatedModel, budget: Budget) -> float:
    return float(budget.cost(gated.size, gated.chance().detach()))


@pytest.mark.parametrize("gate", ["diffprune", "diffprune-deterministic", "hard-concrete"])
@pytest.mark.parametrize("budget", [Budget(macs=0.5), Budget(params=0.3)], ids=["macs", "params"])
def test_the_expected_cost_is_on_target_and_falls_along_the_ramp(gate: str, budget: Budget) -> None:
    gated, events = searched(Useful(), budget, gate=gate)
    assert expected(gated, budget) == pytest.approx(budget.share, rel=2e-3)
    assert [event["step"] for event in events] == list(range(1, 41))
    assert {(event["phase"], event["steps"]) for event in events} == {("search", 160)}
    if budget.kind == "macs":
        targets = [max(1 - 0.5 * (step + 1) / (RAMP * 40), 0.5) for step in range(40)]
        assert [event["macs"] for event in events] == pytest.approx(targets, rel=2e-3)


def test_the_macs_that_are_told_are_macs_under_a_budget_on_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 7, padding=3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 2),
    )  # fmt: skip
    x, events = torch.randn(8, 3, 8, 8), []
    gated = attach(model, surgery.trace(model, x), gate=MeanCentred(noise=0.2))
    batches = endless([(x, torch.arange(8) % 2)])
    search_(gated, batches, Budget(params=0.4), Recipe(), steps=20, total=20, parent=None, on_event=events.append)
    macs = expected(gated, Budget(macs=1.0))
    assert macs > 0.5
    assert events[-1]["macs"] == pytest.approx(macs, rel=0.05)


def test_search_and_recovery_share_one_schedule() -> None:
    rates = []

    class Recorded(Recipe):
        def rate(self, step: int, total: int) -> float:
            rates.append((step, total))
            return 0.0

    gated = attach(Useful(), surgery.trace(Useful(), torch.randn(2, 16)))
    search_(gated, endless(data()), Budget(macs=0.5), Recorded(), steps=3, total=9, parent=None, on_event=rates.append)
    assert [rate for rate in rates if isinstance(rate, tuple)] == [(0, 9), (1, 9), (2, 9)]
    assert torch.equal(gated.model.state_dict()["0.weight"], torch.eye(16)), "the rate is the one that trains"


def test_a_search_that_ends_in_no_numbers_has_diverged() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    gated = attach(model, surgery.trace(model, torch.randn(2, 16)))
    gated.model.get_buffer("1.running_var").fill_(torch.nan)
    with pytest.raises(TrainingDiverged, match="not finite after the search phase"):
        search_(
            gated, endless(data()), Budget(macs=0.5), Recipe(), steps=2, total=4, parent=None, on_event=lambda e: None
        )


def test_what_carries_the_answer_is_kept() -> None:
    for seed in range(2):
        gated, _ = searched(Useful(), Budget(macs=0.5), steps=80, seed=seed)
        (keep,) = gated.keep().values()
        assert keep[:8].all(), keep
        assert not keep[8:].any(), keep
        assert gated.logits[:8].min() > gated.logits[8:].max()


def test_gates_and_weights_move_and_the_given_network_does_not() -> None:
    model = Useful()
    parent = copy.deepcopy(model).eval()
    before = copy.deepcopy(model.state_dict())
    gated, _ = searched(model, Budget(macs=0.5), parent=parent)
    assert gated.logits.detach().sub(1.0).abs().min() > 1e-3
    assert not torch.equal(gated.model.state_dict()["0.weight"], before["0.weight"])
    for network in (model, parent):
        assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
        assert all(p.grad is None for p in network.parameters())
    assert not parent.training


def test_at_the_end_the_gates_are_those_of_the_end_of_the_continuation() -> None:
    gated, _ = searched(Useful(), Budget(macs=0.5))
    assert gated.gate == attach(Useful(), gated.graph).gate.at(1.0)
    gates = gated.sample()
    assert set(gates.tolist()) <= {0.0, 1.0}


def test_frozen_weights_stay_while_the_gates_learn() -> None:
    model = Useful().requires_grad_(False)
    gated, _ = searched(model, Budget(macs=0.5), steps=80)
    assert torch.equal(gated.model.state_dict()["0.weight"], model.state_dict()["0.weight"])
    (keep,) = gated.keep().values()
    assert keep.tolist() == [True] * 8 + [False] * 8


class Two(nn.Sequential):
    """Two widths, of which the second carries noise alone."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 2))


@pytest.mark.parametrize("gate", ["diffprune", "hard-concrete"])
def test_a_search_of_widths_moves_groups_as_one_and_no_weight(gate: str) -> None:
    model = Two()
    model[2].weight.requires_grad_(False)
    gated = attach(model, surgery.trace(model, torch.randn(2, 16)), gate=gate)
    gated.logits.data += torch.linspace(-1, 1, 22)
    before, weights = gated.logits.detach().clone(), copy.deepcopy(gated.model.state_dict())
    options: dict[str, Any] = {"steps": 20, "total": 20, "parent": None, "widths": True}
    search_(gated, endless(data()), Budget(macs=0.5), Recipe(), **options)
    first, second = (gated.logits.detach() - before).split([12, 10])
    assert first.std() < 1e-5 > second.std()
    assert (first[0] - second[0]).abs() > 1e-3
    assert all(torch.equal(weights[name], value) for name, value in gated.model.state_dict().items())
    learning = [name for name, p in gated.model.named_parameters() if p.requires_grad]
    assert learning == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad is None for p in gated.parameters_of_model())
    gated.logits.sum().backward()
    assert gated.logits.grad is not None, "the mean was taken in the search alone"


def test_a_clip_holds_the_gradient_of_the_weights() -> None:
    def moved(clip: float | None) -> float:
        gated = attach(Useful(), surgery.trace(Useful(), torch.randn(2, 16)))
        recipe = Recipe(weight_decay=0.0, clip=clip)
        options: dict[str, Any] = {"steps": 3, "total": 12, "parent": None, "on_event": lambda event: None}
        search_(gated, endless(data()), Budget(macs=0.5), recipe, **options)
        return float((gated.model[0].weight - torch.eye(16)).norm())

    assert moved(1e-7) < 1e-7 < 1e-5 < moved(None)


def test_no_steps_change_nothing() -> None:
    gated, events = searched(Useful(), Budget(macs=0.5), steps=0)
    assert events == []
    assert gated.logits.eq(1).all()
    assert gated.shift == 0


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_the_shift_follows_a_share(share: float) -> None:
    gated = attach(Useful(), surgery.trace(Useful(), torch.randn(2, 16)), gate=MeanCentred(noise=0.2))
    with torch.no_grad():
        gated.logits.copy_(torch.linspace(-2, 2, 16))
    follow_(gated, Budget(macs=0.5), share)
    assert expected(gated, Budget(macs=0.5)) == pytest.approx(share, rel=2e-3)
    opened = torch.sigmoid((torch.linspace(-2, 2, 16) + gated.shift) / 0.2)  # both layers are linear in the open units
    assert opened.mean().item() == pytest.approx(share, rel=2e-3)
    follow_(gated, Budget(macs=0.5), 1.0)
    assert expected(gated, Budget(macs=0.5)) >= 0.999 - 1e-6


def test_data_that_is_no_number_stops_the_search() -> None:
    x, y = data()[0]
    graph = surgery.trace(Useful(), torch.randn(2, 16))
    with pytest.raises(TrainingDiverged, match="the loss is nan at step 0 of the search phase"):
        search_(
            attach(Useful(), graph), endless([(x * torch.nan, y)]), Budget(macs=0.5), Recipe(),
            steps=5, total=10, parent=None, on_event=lambda event: None,
        )  # fmt: skip
