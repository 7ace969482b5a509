"""Budgets: what is refused, a shift that meets the expected cost, and structures that meet the true one."""

import itertools
from collections.abc import Callable
from functools import cache
from math import nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18
from zoo import ZOO, randomised

import surgery
from benchmarks.cifar_resnet import CifarResNet
from benchmarks.lenet5 import lenet5
from diffprune.budget import Budget, shift_for
from diffprune.errors import BadBudget, BudgetUnreachable
from diffprune.gates import Gate, HardConcrete, MeanCentred
from diffprune.landing import Landing, land, least_share, require_reachable, steps
from surgery import SizeModel

KINDS = ("macs", "params")


class Wide(nn.Sequential):
    """Enough units that single ones are small change; three sizes of steps, a skip-free chain."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 5),
        )  # fmt: skip


class Flat(nn.Sequential):
    """16 inputs of the linear layer per channel: when its width lies on the grid, that of the convolution may not."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 24), nn.Linear(24, 5)
        )


NETWORKS = {
    "wide": (Wide, (1, 3, 4, 4)),
    "flat": (Flat, (1, 3, 4, 4)),
    **{n: (ZOO[n].build, ZOO[n].shape) for n in ("dense_concat", "grouped", "depthwise", "flatten_to_linear")},
}


@cache
def traced(name: str) -> tuple[nn.Module, SizeModel, Tensor]:
    build, shape = NETWORKS[name]
    model, x = randomised(build()).double().eval(), torch.randn(shape, dtype=torch.float64)
    return model, SizeModel(surgery.trace(model, x)), x


def counted(model: nn.Module, x: Tensor) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return {
        "macs": counter.get_total_flops() // (2 * x.shape[0]),
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }


def random_scores(size: SizeModel, seed: int) -> Tensor:
    """With ties, and whole groups of low scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(size.units, generator=generator)
    offsets = torch.randn(len(size.graph.groups), generator=generator)
    scores += offsets.repeat_interleave(torch.tensor([g.units for g in size.graph.groups]))
    return scores if seed % 2 else (4 * scores).round()


def landed(budget: Budget, size: SizeModel, scores: Tensor, round_to: int) -> Landing:
    """What `land` found, after every law that holds for any structure."""
    landing = land(budget, size, scores, round_to=round_to)
    assert landing.reached <= budget.share
    assert landing.reached == pytest.approx(float(budget.cost(size, landing.flat.double())), rel=1e-12)
    assert (landing.note is None) == (landing.reached >= 0.99 * budget.share)
    sizes = [g.units for g in size.graph.groups]
    parts = zip(size.graph.groups, landing.flat.split(sizes), scores.split(sizes), steps(size, round_to), strict=True)
    start = 0
    for group, kept, score, step in parts:
        assert kept.sum() >= step
        for slot in group.slots:
            channels = slot.positions.shape[1]
            if group.units * channels % round_to == 0:
                assert int(kept.sum()) * channels % round_to == 0, f"{slot.tensor} axis {slot.axis}"
        if not kept.all():
            assert score[kept].min() >= score[~kept].max()
            more = landing.flat.clone()
            more[start + (~kept).nonzero().squeeze(1)[:step]] = True
            assert float(budget.cost(size, more.double())) > budget.share, f"another step of {group.name} fits"
        start += group.units
    return landing


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "exactly one of macs, params and speedup is asked; got none"),
        ({"macs": 0.5, "params": 0.5}, "exactly one .* got {'macs': 0.5, 'params': 0.5}"),
        ({"macs": 0.0}, "macs is a share .* got 0"),
        ({"params": 0.0}, "params is a share .* got 0"),
        ({"params": -0.1}, "params is a share .* got -0.1"),
        ({"macs": 1.01}, "at most 1; got 1.01"),
        ({"macs": nan}, "got nan"),
        ({"speedup": 1.0}, "speedup is dense latency / pruned latency, above 1; got 1"),
        ({"speedup": float("inf")}, "above 1; got inf"),
        ({"speedup": nan}, "above 1; got nan"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(asked: dict[str, float], words: str) -> None:
    with pytest.raises(BadBudget, match=words) as caught:
        Budget(**asked)
    assert str(caught.value).splitlines()[3].startswith("  fix     ")
    assert isinstance(caught.value, ValueError)


def test_kind_and_share() -> None:
    assert (Budget(macs=0.25).kind, Budget(macs=0.25).share) == ("macs", 0.25)
    assert (Budget(params=1.0).kind, Budget(params=1).share) == ("params", 1)
    assert (Budget(speedup=4).kind, Budget(speedup=4).share, Budget(speedup=4).asked) == ("speedup", 0.25, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "gate",
    [MeanCentred(0.2), MeanCentred(0.02), MeanCentred(0.1, stochastic=False), HardConcrete()],
    ids=str,
)
def test_the_shift_meets_the_expected_cost(kind: str, gate: Gate) -> None:
    _, size, _ = traced("wide")
    spread, equal = random_scores(size, 1), torch.zeros(size.units)
    for logits in (spread, equal):
        for start in (0.0, 5.0, -300.0):
            for tenths in range(1, 10):
                budget = Budget(**{kind: tenths / 10})
                shift = shift_for(budget, size, gate, logits, budget.share, start)
                found = float(budget.cost(size, gate.chance(logits + shift)))
                assert found == pytest.approx(budget.share, rel=2e-3)


@pytest.mark.parametrize("gate", [MeanCentred(1.0), MeanCentred(0.2), HardConcrete()], ids=str)
def test_sampled_networks_cost_on_average_what_the_shift_promises(gate: Gate) -> None:
    _, size, _ = traced("wide")
    logits = random_scores(size, 1)
    budget = Budget(macs=0.4)
    logits += shift_for(budget, size, gate, logits, 0.4, 0.0)
    torch.manual_seed(0)
    group = torch.zeros(size.units, dtype=torch.long)
    costs = torch.stack([budget.cost(size, (gate.sample(logits, group) > 0).double()) for _ in range(800)])
    assert costs.std() > 1e-3
    assert abs(costs.mean() - 0.4) < 4 * costs.std() / 800**0.5 + 0.4 * 2e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_that_no_shift_reaches_opens_or_closes_all(kind: str) -> None:
    _, size, _ = traced("dense_concat")
    budget, logits = Budget(**{kind: 0.5}), torch.zeros(size.units)
    for share, chance in ((0.0, 0.0), (1.5, 1.0)):
        shift = shift_for(budget, size, MeanCentred(), logits, share, 0.0)
        assert torch.equal(MeanCentred().chance(logits + shift), torch.full((size.units,), chance))


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(list(NETWORKS)),
    kind=st.sampled_from(KINDS),
    round_to=st.sampled_from([1, 4, 8, 16]),
    seed=st.integers(0, 10_000),
    part=st.floats(0, 1),
)
def test_every_landing_keeps_the_laws(name: str, kind: str, round_to: int, seed: int, part: float) -> None:
    model, size, x = traced(name)
    least = least_share(Budget(**{kind: 1}), size, round_to)
    budget = Budget(**{kind: least + part * (1 - least)})
    landing = landed(budget, size, random_scores(size, seed), round_to)
    found, dense = counted(surgery.cut(model, size.graph, size.keep(landing.flat)), x), counted(model, x)
    assert found[kind] / dense[kind] == pytest.approx(landing.reached, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_with_enough_units_the_budget_is_met_within_two_percent(kind: str) -> None:
    _, size, _ = traced("wide")
    for tenths in range(1, 10):
        for seed in range(6):
            landing = landed(Budget(**{kind: tenths / 10}), size, random_scores(size, seed), 1)
            assert landing.reached >= 0.98 * tenths / 10


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: CifarResNet(3), (3, 32, 32)), (lambda: CifarResNet(9), (3, 32, 32)), (resnet18, (3, 32, 32)),
     (lenet5, (1, 28, 28))],
    ids=["resnet20", "resnet56", "resnet18", "lenet5"],
)  # fmt: skip
def test_real_networks_land_within_one_percent(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    size = SizeModel(surgery.trace(make().eval(), torch.randn(1, *shape)))
    for kind, tenths in itertools.product(KINDS, range(1, 10)):
        landing = landed(Budget(**{kind: tenths / 10}), size, random_scores(size, seed=tenths % 2), 1)
        assert landing.reached >= 0.99 * tenths / 10
        assert landing.note is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("round_to", [1, 8])
def test_equal_scores_are_kept_in_equal_shares(kind: str, round_to: int) -> None:
    """None gets a step less than in the largest even structure; what is left goes where it fits, to cheap groups."""
    _, size, _ = traced("wide")
    sizes, grid = [g.units for g in size.graph.groups], steps(size, round_to)

    def even(share: float) -> list[int]:
        return [max(int(share * units / step), 1) * step for units, step in zip(sizes, grid, strict=True)]

    for tenths in (2, 5, 8):
        budget = Budget(**{kind: tenths / 10})
        landing = landed(budget, size, torch.ones(size.units), round_to)
        fitting = [
            counts
            for counts in (even(percent / 100) for percent in range(1, 101))
            if float(budget.cost(size, torch.cat([torch.arange(u) < n for u, n in zip(sizes, counts, strict=True)])))
            <= budget.share
        ]
        counts = [int(kept.sum()) for kept in landing.flat.split(sizes)]
        for count, fair, step in zip(counts, fitting[-1], grid, strict=True):
            assert count >= fair - step, (counts, fitting[-1])
        assert landing.reached > (0.98 if round_to == 1 else 0.8) * budget.share


def test_a_note_says_why_a_structure_falls_short() -> None:
    _, size, _ = traced("wide")
    landing = landed(Budget(macs=0.5), size, random_scores(size, 3), 16)
    assert landing.reached < 0.49
    assert landing.note == "no further step of 16 channels fits into the rest of the budget"


def test_the_whole_budget_keeps_all() -> None:
    for name in NETWORKS:
        _, size, _ = traced(name)
        for kind in KINDS:
            for round_to in (1, 16):
                landing = land(Budget(**{kind: 1.0}), size, random_scores(size, 1), round_to=round_to)
                assert landing.flat.all()
                assert (landing.reached, landing.note) == (1.0, None)


def test_steps_by_hand() -> None:
    assert steps(traced("wide")[1], 16) == [16, 16, 16, 8]  # widths 48, 64, 64, 40
    assert steps(traced("flat")[1], 16) == [16, 8]  # 32 filters read 16-fold, 24 neurons
    assert steps(traced("flat")[1], 1) == [1, 1]
    assert steps(traced("flatten_to_linear")[1], 16) == [2]  # 6 filters, 216 inputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("round_to", [1, 16])
def test_an_unreachable_budget_names_the_least_share_and_the_advice_works(kind: str, round_to: int) -> None:
    for name in ("wide", "flat", "dense_concat"):
        _, size, _ = traced(name)
        least = least_share(Budget(**{kind: 1}), size, round_to)
        one_step = [torch.arange(g.units) < s for g, s in zip(size.graph.groups, steps(size, round_to), strict=True)]
        assert least == float(Budget(**{kind: 1}).cost(size, torch.cat(one_step).double()))
        with pytest.raises(BudgetUnreachable, match=f"the least reachable is {least:.3g}") as caught:
            land(Budget(**{kind: least * 0.99}), size, torch.ones(size.units), round_to=round_to)
        text = str(caught.value)
        assert ("smaller round_to" in text) == (round_to > 1)
        require_reachable(Budget(**{kind: float(text.split("ask for ")[1].split()[0])}), size, round_to)


@pytest.mark.parametrize("name", ["wide", "flat"])
def test_the_smallest_structure_is_within_the_speed_up_that_it_has(name: str) -> None:
    """1 / (1 / x) is not always x."""
    _, size, _ = traced(name)
    for floor in torch.linspace(0.01, 0.9, 200, dtype=torch.float64).tolist():
        assert floor <= Budget(speedup=1 / floor).limit
        assert Budget(macs=floor).limit == floor
    smallest = least_share(Budget(macs=0.5), size)
    assert land(Budget(macs=smallest), size, torch.randn(size.units)).reached == smallest
