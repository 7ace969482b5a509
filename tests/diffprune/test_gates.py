"""Gates: exact zeros, open gates around one, chances that sampling confirms, gradients that formulas confirm."""

from dataclasses import replace
from math import sqrt

import pytest
import torch
from torch import Tensor

from diffprune.gates import GATES, Gate, HardConcrete, MeanCentred

GROUP = torch.tensor([0] * 5 + [1] * 40 + [2] * 1 + [3] * 14)


def logits(dtype: torch.dtype = torch.float64) -> Tensor:
    """On both sides of zero, as far as a search takes them; group 2 is a single unit."""
    return torch.linspace(-4, 4, len(GROUP), dtype=dtype)[torch.randperm(60, generator=seeded(3))]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampled(gate: Gate, at: Tensor, seed: int = 0, group: Tensor = GROUP) -> Tensor:
    torch.manual_seed(seed)
    return gate.sample(at, group)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("noise", [1.0, 0.2, 0.02])
def test_closed_gates_are_zero_and_the_open_ones_of_a_group_average_one(stochastic: bool, noise: float) -> None:
    gate, closed, spread = MeanCentred(noise, relaxation=1.0, stochastic=stochastic), 0, 0.0
    for seed in range(20):
        gates = sampled(gate, logits(torch.float32), seed)
        for index in range(4):
            mine = gates[index == GROUP]
            opened = mine[mine != 0]
            closed += len(mine) - len(opened)
            if len(opened):
                assert opened.mean().item() == pytest.approx(1, abs=1e-6)
                assert 0 < opened.min() <= opened.max() < 2
                spread = max(spread, (opened.max() - opened.min()).item())
    assert closed > 20 * 10, "hardly a gate was closed"
    assert spread > 0.1, "the relaxation moved nothing"


def test_without_noise_a_unit_is_open_when_its_logit_is_positive() -> None:
    at = logits()
    for gate in (MeanCentred(stochastic=False), MeanCentred(noise=0.0)):
        assert torch.equal(sampled(gate, at) > 0, at > 0)
    assert torch.equal(MeanCentred().hard(at), (at > 0).double())


def test_without_noise_the_chance_is_the_decision() -> None:
    at = torch.tensor([-1.0, -1e-3, 1e-3, 1.0])
    assert MeanCentred(noise=0.0).chance(at).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("wrong", [{"noise": -0.1}, {"noise": float("nan")}, {"relaxation": -1.0}, {"relaxation": 3.0}])
def test_gates_that_would_be_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="noise is 0 or more, relaxation from 0 to 1"):
        MeanCentred(**wrong)


def test_no_relaxation_leaves_the_bare_decision() -> None:
    for stochastic in (True, False):
        gate = MeanCentred(relaxation=0.0, stochastic=stochastic)
        gates = sampled(gate, logits())
        assert torch.equal(gates, (sampled(replace(gate, relaxation=1.0), logits()) > 0).double())
        assert set(gates.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    "gate",
    [*(MeanCentred(noise=n) for n in (1.0, 0.2, 0.02)), HardConcrete(), HardConcrete(beta=0.4, gamma=-0.3, zeta=1.2)],
    ids=str,
)
def test_chance_is_how_often_a_unit_is_open(gate: Gate) -> None:
    count = 40_000
    at = torch.tensor([-2.398, -0.4, -0.03, 0.0, 0.02, 0.3, 1.5], dtype=torch.float64)
    torch.manual_seed(5)
    many = at.repeat(count)
    opened = gate.sample(many, torch.arange(len(many)) // len(at)).view(count, -1).ne(0).double().mean(0)
    for chance, found in zip(gate.chance(at).tolist(), opened.tolist(), strict=True):
        assert abs(found - chance) <= 4 * sqrt(chance * (1 - chance) / count) + 2e-6  # uniform noise ends at 1e-6


@pytest.mark.parametrize(
    ("logit", "open_", "whole", "mean"),
    [
        (-4.605, 0.047, 0.002, 0.013),
        (-2.398, 0.310, 0.018, 0.103),
        (-1.599, 0.500, 0.039, 0.194),
        (0.0, 0.832, 0.168, 0.500),
        (0.847, 0.920, 0.32, 0.68),
        (2.944, 0.989, 0.79, 0.94),
        (4.605, 0.998, 0.95, 0.987),
    ],
)
def test_hard_concrete_against_its_table(logit: float, open_: float, whole: float, mean: float) -> None:
    gate, count = HardConcrete(), 100_000
    torch.manual_seed(7)
    many = torch.full((count,), logit, dtype=torch.float64)
    gates = gate.sample(many, torch.zeros(count, dtype=torch.long))
    assert gate.chance(many[:1]).item() == pytest.approx(open_, abs=6e-4)
    assert gates.eq(1).double().mean().item() == pytest.approx(whole, abs=7e-3)
    assert gates.mean().item() == pytest.approx(mean, abs=7e-3)
    assert gates.min() >= 0


def test_hard_concrete_at_test_time_by_hand() -> None:
    hard = HardConcrete().hard(torch.tensor([-4.0, -2.3979, -2.3978, -1.599, 0.0, 0.847, 2.944]).double())
    expected = torch.tensor([0, 0, 0, 0.1018, 0.5, 0.7399, 1]).double()  # sigmoid(l) * 1.2 - 0.1 in [0, 1]
    assert torch.allclose(hard, expected, atol=2e-4)
    assert (hard > 0).tolist() == [False, False, True, True, True, True, True]


@pytest.mark.parametrize("name", GATES)
def test_gradient_of_chance(name: str) -> None:
    at = torch.tensor([-1.3, -0.2, 0.0, 0.1, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GATES[name].chance, (at,))
    torch.autograd.backward(GATES[name].chance(at).sum())
    assert at.grad is not None
    assert at.grad.min() > 0


def test_gradient_of_hard_concrete_samples() -> None:
    at = logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: sampled(HardConcrete(), a), (at,))


@pytest.mark.parametrize("gate", [MeanCentred(0.5, 0.7), MeanCentred(0.2, 1.0, False)], ids=str)
def test_gradient_of_mean_centred_samples_with_the_mean_as_a_constant(gate: MeanCentred) -> None:
    at = logits().requires_grad_()
    opened = (sampled(gate, at) > 0).double()
    slope = torch.sigmoid(at) * (1 - torch.sigmoid(at))
    found = torch.autograd.functional.jacobian(lambda a: sampled(gate, a), at)
    expected = torch.diag(gate.relaxation * opened * slope)
    assert torch.allclose(found, expected, rtol=1e-10, atol=0)
    assert 10 < opened.sum() < 50


def test_groups_do_not_see_each_other() -> None:
    gate, at = MeanCentred(noise=0.3, relaxation=1.0), logits()
    moved = torch.where(GROUP == 1, at + 1.0, at)
    before, after = sampled(gate, at), sampled(gate, moved)
    assert torch.equal(before[GROUP != 1], after[GROUP != 1])
    assert not torch.equal(before[GROUP == 1], after[GROUP == 1])


@pytest.mark.parametrize("name", GATES)
def test_the_seed_decides(name: str) -> None:
    first, again, other = (sampled(GATES[name], logits(), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "diffprune-deterministic")


@pytest.mark.parametrize("name", GATES)
def test_hard_is_exactly_one_at_the_start(name: str) -> None:
    gate = GATES[name]
    at = torch.full((4,), gate.start)
    assert torch.equal(gate.hard(at), torch.ones(4))
    assert gate.chance(at).min() > 0.98


def test_continuation_of_mean_centred_gates() -> None:
    gate = MeanCentred(noise=0.4, relaxation=0.5, stochastic=False)
    assert gate.at(0.0) == gate
    assert gate.at(0.5).noise == pytest.approx(0.4 * sqrt(0.1))
    assert gate.at(0.75).relaxation == 0.5
    assert gate.at(0.9).relaxation == pytest.approx(0.25)
    assert gate.at(1.0).noise == pytest.approx(0.04)
    assert gate.at(1.0).relaxation == 0
    assert not gate.at(1.0).stochastic
    assert HardConcrete().at(0.7) == HardConcrete()


@pytest.mark.parametrize("name", GATES)
def test_gates_stay_float32_under_autocast(name: str) -> None:
    at = logits(torch.float32)
    plain = sampled(GATES[name], at)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sampled(GATES[name], at), GATES[name].chance(at), GATES[name].hard(at)
    assert [t.dtype for t in cast] == [torch.float32] * 3
    assert torch.equal(cast[0], plain)
