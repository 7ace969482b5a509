"""Networks that nobody thought of: what surgery promises holds for each, and a wrong rule would be seen."""

from collections import Counter
from typing import Any

import pytest
import random_networks
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_networks import (
    CUTS,
    Activation,
    Broken,
    Conv,
    Halves,
    Network,
    Number,
    Reorder,
    Residual,
    Slice,
    Twice,
    Verdict,
    judge,
    networks,
)
from torch import Tensor

from surgery import finder
from surgery.operators import RULES

FIXED = settings(
    max_examples=8, deadline=None, derandomize=True, database=None, print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

CONV = Conv(out=6, kernel=1, groups=1, bias=True)
HALVED = Network(stem=8, steps=(Halves(steps=(CONV,), via="chunk"), CONV), head="linear")
FLIPPED = Network(stem=8, steps=(Reorder(kind="flip and add"), Activation(kind="relu"), CONV), head="linear")


def kind(verdict: Verdict) -> str:
    return "blank" if verdict.blank else "refused" if verdict.refused else "free" if verdict.groups else "all pinned"


def chunk_without_ties(call: Any, x: Tensor, chunks: int, axis: int = 0) -> Any:
    return call.run(x, chunks, axis)


def flip_as_identity(call: Any, x: Tensor, axes: list[int]) -> Tensor:
    return x


FAULTS = {"chunk": (HALVED, chunk_without_ties), "flip": (FLIPPED, flip_as_identity)}


def test_the_promise_holds_for_random_networks_and_most_can_be_cut() -> None:
    verdicts: list[Verdict] = []

    @FIXED
    @given(networks(most=2, leaves=3))
    def judged(network: Network) -> None:
        verdicts.append(judge(network))

    judged()
    found = Counter(kind(verdict) for verdict in verdicts)
    assert found["free"] >= 0.5 * len(verdicts), found
    assert found["blank"] + found["refused"] <= 0.1 * len(verdicts), found
    assert sum(verdict.compared for verdict in verdicts) >= 0.9 * CUTS * found["free"], "outputs are constant"


@pytest.mark.parametrize("network", [HALVED, FLIPPED], ids=FAULTS)
def test_the_networks_of_the_faults_are_cut_as_they_should(network: Network) -> None:
    verdict = judge(network)
    assert verdict.groups >= 2
    assert verdict.free >= 10


def test_a_slice_that_is_written_hides_nothing() -> None:
    """Found by the soak: with one unit left on either half, the constant of the slice fitted by chance."""
    written = Halves(steps=(Slice(kind="assign"), Twice(share="bias")), via="slices")
    network = Network(stem=6, steps=(Residual(steps=(written,), shortcut="pad", inplace=True), CONV), head="flatten")
    assert judge(network).compared == CUTS


def test_half_of_a_width_rounded_up_is_no_reason_to_cut_what_one_unit_less_does_not_show() -> None:
    """Found by the soak: of six channels the first three are read, of five as well, of four two."""
    halved = Residual(steps=(Slice(kind="half"),), shortcut="pad", inplace=False)
    network = Network(stem=6, steps=(halved, Activation(kind="softplus")), head="two")
    assert judge(network).free == 0


def test_of_two_units_each_is_cut() -> None:
    """Found by the soak: a ramp over the width goes on as it began when the last of two channels goes."""
    two = Conv(out=2, kernel=1, groups=1, bias=True)
    network = Network(stem=4, steps=(two, Number(kind="ramp"), CONV), head="linear")
    assert judge(network).free == 4 + 6


@pytest.mark.parametrize("operator", FAULTS)
def test_a_wrong_rule_is_found_by_the_proof_of_the_finder(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, fault = FAULTS[operator]
    right = judge(network)
    monkeypatch.setitem(RULES, operator, fault)
    wrong = judge(network)
    assert wrong.free < right.free


@pytest.mark.parametrize("operator", FAULTS)
def test_a_wrong_rule_breaks_the_promise_if_nothing_is_proven(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, fault = FAULTS[operator]
    monkeypatch.setitem(RULES, operator, fault)
    monkeypatch.setattr(finder._Search, "_disproof", lambda *_: None)
    with pytest.raises(Broken, match="of Network\\(stem=8"):
        judge(network)


def test_a_search_over_networks_finds_a_wrong_rule_and_shrinks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "flip", flip_as_identity)
    monkeypatch.setattr(finder._Search, "_disproof", lambda *_: None)
    step = st.builds(Reorder, kind=st.sampled_from(["flip width", "flip"])) | st.builds(Activation)
    flips = st.builds(Network, steps=st.lists(step, min_size=1, max_size=3).map(tuple))

    @settings(FIXED, phases=[Phase.generate, Phase.shrink])
    @given(flips)
    def judged(network: Network) -> None:
        judge(network)

    with pytest.raises(Broken, match="flip") as caught:
        judged()
    assert "Activation" not in str(caught.value)


def test_a_description_can_be_pasted() -> None:
    again = eval(repr(HALVED), vars(random_networks))
    assert again == HALVED
    torch.manual_seed(0)
    assert again.build()(HALVED.example().float()).shape == (2, 5)
