"""Hints: zero for a network that reads what its parent reads, and a pull towards it for one that does not."""

import copy

import pytest
import torch
from torch import Tensor, nn
from zoo import traced

import surgery
from diffprune.feeding import endless
from diffprune.hints import hinted, hinting
from diffprune.training import Recipe, fit_


def cut_of(name: str, closed: int) -> tuple[nn.Module, nn.Module, dict[tuple[str, int], Tensor], list[str], Tensor]:
    model, graph, x = traced(name)
    keep = {group.name: torch.arange(group.units) >= closed for group in graph.groups}
    small = surgery.cut(model, graph, keep)
    return model, small, graph.checked(keep)[1], [layer.weight for layer in graph.layers], x


@pytest.mark.parametrize("name", ["residual", "flatten_to_linear", "shared_module", "multihead_attention"])
def test_a_network_that_lost_nothing_gets_no_hint(name: str) -> None:
    parent, small, alive, weights, x = cut_of(name, 0)
    with hinting(small, parent, weights, alive) as hint:
        parent(x), small(x)
        assert hint() == 0


def test_the_distance_is_that_of_the_kept_channels() -> None:
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(5, 3, 6, 6)
    graph = surgery.trace(parent, x)
    keep = {"0": torch.tensor([True, False, True, True])}
    small = surgery.cut(parent, graph, keep)
    with torch.no_grad():
        small[0].bias.add_(0.5)
    with hinting(small, parent, ["0.weight", "2.weight"], graph.checked(keep)[1]) as hint:
        parent(x), small(x)
        found = hint()
    theirs, ours = parent[:2](x)[:, keep["0"]], small[:2](x)
    distance = (theirs - ours).square().mean() / theirs.var()
    assert float(found) == pytest.approx(float(distance.log1p() / 2), rel=1e-5)


def test_layers_that_run_twice_are_compared_each_time_and_hooks_are_gone_afterwards() -> None:
    parent, small, alive, _, x = cut_of("shared_module", 1)
    with hinting(small, parent, ["a.weight"], alive) as hint:
        parent(x), small(x)
        first = hint()
        assert first > 1e-6, "the second time it reads what the cut has changed"
        parent(x), small(x)
        assert hint() == first
        assert hint() == 0
    assert not any(m._forward_pre_hooks for net in (parent, small) for m in net.modules())


def test_training_with_hints_brings_what_is_read_nearer() -> None:
    parent, small, alive, weights, x = cut_of("residual", 2)
    found = []
    for strength in (0.0, 50.0):
        torch.manual_seed(0)
        student = copy.deepcopy(small)
        with hinting(student, parent, weights, alive) as hint:
            fit_(
                student, endless([(x,)]), Recipe(lr=0.01, hints=strength), steps=range(30), total=30, parent=parent,
                hint=hint, phase="recover", on_event=lambda event: None,
            )
            student.train()
            hint()
            parent(x), student(x)
            found.append(float(hint()))
    assert found[1] < 0.8 * found[0]


def test_hints_are_for_what_several_layers_read_else_for_all() -> None:
    _, graph, _ = traced("residual")
    shared = [group for group in graph.groups if len(group.readers) > 1]
    assert shared
    assert set(hinted(graph)) == {slot.tensor for group in shared for slot in group.readers}
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    graph = surgery.trace(chain, torch.randn(2, 3, 6, 6))
    assert hinted(graph) == ["0.weight", "2.weight"]
