"""Each failure of a search that is known speaks up, and a good search says nothing."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import surgery
from diffprune import Budget, GatedModel, MeanCentred, attach, compress
from diffprune.detectors import concerns, lost
from diffprune.landing import Landing, land
from diffprune.search import follow_

BUDGET = Budget(macs=0.5)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return resnet18(num_classes=10).eval()


def searched(model: nn.Module, noise: float = 0.01) -> tuple[GatedModel, Landing]:
    """Gates in a random order, on target."""
    gated = attach(model, surgery.trace(model, torch.randn(2, 3, 32, 32)), gate=MeanCentred(noise=noise))
    gated.start_from_(torch.rand(gated.size.units, generator=torch.Generator().manual_seed(0)).double())
    follow_(gated, BUDGET, BUDGET.share)
    return gated, land(BUDGET, gated.size, gated.scores())


def test_a_good_search_raises_no_concern(model: nn.Module) -> None:
    gated, landing = searched(model)
    assert concerns(gated, BUDGET, landing, landing.flat.roll(1), 50) == []


def test_a_search_that_changed_nothing(model: nn.Module) -> None:
    gated, landing = searched(model)
    (text,) = concerns(gated, BUDGET, landing, landing.flat, 50)
    assert "chose the same" in text
    assert concerns(gated, BUDGET, landing, landing.flat, 0) == []


def test_an_expected_cost_that_missed_its_target(model: nn.Module) -> None:
    gated, landing = searched(model)
    gated.shift.add_(0.1)
    (text,) = concerns(gated, BUDGET, landing, landing.flat.roll(1), 50)
    assert "where 50.0% was asked" in text


def test_gates_that_are_undecided(model: nn.Module) -> None:
    gated, landing = searched(model, noise=3.0)
    with torch.no_grad():
        gated.logits.copy_(-gated.logits.abs().clamp_max(0.1))
    gated.shift.zero_()
    follow_(gated, BUDGET, BUDGET.share)
    (text,) = concerns(gated, BUDGET, landing, landing.flat.roll(1), 50)
    assert "undecided" in text


def test_a_collapsed_layer_is_named(model: nn.Module) -> None:
    gated, landing = searched(model)
    group = gated.graph.groups[-1]
    landing.flat[-group.units + 1 :] = False
    landing.flat[-group.units] = True
    (text,) = concerns(gated, BUDGET, landing, landing.flat.roll(1), 50)
    assert f"1 layer collapsed to a single unit or less than 5% of them: {group.name} (1 of {group.units})" in text


def test_a_narrow_layer_with_a_single_unit_left_has_collapsed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3))
    gated = attach(model, surgery.trace(model, torch.ones(2, 12)))
    budget, narrow = Budget(macs=0.5), torch.tensor([True] + 15 * [False] + [True] + 3 * [False])
    (text,) = concerns(gated, budget, Landing(narrow, 0.5, None), narrow, 0)
    assert "1 layer collapsed" in text
    assert "(1 of 16)" in text
    two = narrow.clone()
    two[1] = True
    assert concerns(gated, budget, Landing(two, 0.5, None), two, 0) == []


def test_compress_tells_and_reports() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    batches = [(torch.randn(8, 3, 4, 4), torch.randint(5, (8,)))]
    events: list[dict[str, object]] = []
    result = compress(model, batches, batches, budget=Budget(macs=0.04), epochs=0, on_event=events.append)
    assert "collapsed" in result.report["warnings"][0]
    assert {"phase": "warning", "text": result.report["warnings"][0]} in events


def test_a_recovery_that_loses_accuracy_says_so_where_examples_can_tell() -> None:
    (text,) = lost(0.96, 0.81, 450)
    assert text.startswith("training took the accuracy from 96.0% after the cut and fit to 81.0%")
    assert lost(0.96, 0.95, 450) == []
    assert lost(0.96, 0.945, 10_000) != []
    assert lost(0.5, 0.42, 100) == []
    assert lost(1.0, 39 / 40, 40) == [], "one image of 40 tells nothing, also where all were right before"
    assert lost(1.0, 0.7, 40) != []
