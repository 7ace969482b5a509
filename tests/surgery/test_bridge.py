"""torch-pruning's criteria give our groups the scores that they give its own, and score what it cannot follow."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from zoo import ZOO, randomised, short_densenet
from zoo import traced as traced_case

import surgery
from surgery import ChannelGraph, ChannelGroup
from surgery.bridge import importance, torch_pruning_groups

NETWORKS = ("resnet18", "mobilenet_v2", "densenet")
CRITERIA: dict[str, Callable[[], Any]] = {
    "magnitude": tp.importance.MagnitudeImportance,
    "l1 of the first": lambda: tp.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer=None),
    "with biases": lambda: tp.importance.MagnitudeImportance(group_reduction="max", normalizer="max", bias=True),
    "lamp": tp.importance.LAMPImportance,
    "bn scale": tp.importance.BNScaleImportance,
    "taylor": tp.importance.TaylorImportance,
    "hessian": tp.importance.HessianImportance,
    "fpgm": tp.importance.FPGMImportance,
}
WIDE = (
    "grouped", "chunk_gate", "multihead_attention", "class_token", "layer_norm_mlp", "group_norm", "depthwise",
    "transposed", "flatten_to_linear", "bare_scale", "functional_conv", "tied_weight", "prelu_sigmoid", "einsum",
    "channel_shuffle", "pixel_shuffle", "flip", "c2f", "lstm_tail", "self_concat", "unused",
)


@cache
def traced(name: str) -> tuple[nn.Module, ChannelGraph, tuple[Any, ...]]:
    """A network with gradients, its channel graph and the groups that torch-pruning finds."""
    torch.manual_seed(0)
    model = short_densenet() if name == "densenet" else torchvision.models.get_model(name, weights=None)
    model, x = model.double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)  # terms of either sign cancel
    randomised(model)
    model(x).square().mean().backward()
    graph = surgery.trace(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dependencies = tp.DependencyGraph().build_dependency(model, x, verbose=False)
        return model, graph, tuple(dependencies.get_all_groups(ignored_layers=[]))


def theirs(ours: Any, groups: tuple[Any, ...]) -> Any:
    """The group of torch-pruning that cuts the same channels of the root of `ours`."""
    (found,) = [
        group for group in groups for item in group.items
        if item.dep.layer is ours[0].dep.layer and item.dep.handler == ours[0].dep.handler
        and sorted(item.idxs) == ours[0].idxs
    ]
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_the_groups_have_the_members_of_torch_prunings(name: str) -> None:
    model, graph, groups = traced(name)
    layers = nn.modules.conv._ConvNd | nn.Linear | nn.BatchNorm2d

    def members(group: Any) -> set[tuple[object, ...]]:
        return {
            (id(item.dep.layer), item.dep.handler, tuple(item.idxs), tuple(item.root_idxs))
            for item in group.items if isinstance(item.dep.layer, layers)
        }

    ours = torch_pruning_groups(model, graph)
    assert ours.keys() == graph.by_name.keys()
    assert len(ours) > 10
    for group in ours.values():
        assert len(members(group)) == len(group)
        assert members(group) == members(theirs(group, groups))


@pytest.mark.parametrize(("name", "criterion"), [
    pytest.param(name, criterion, marks=[pytest.mark.soak] * (name != "resnet18" and criterion != "magnitude"))
    for name in NETWORKS for criterion in CRITERIA
])
def test_the_scores_are_those_of_torch_prunings_groups(name: str, criterion: str) -> None:
    model, graph, groups = traced(name)
    ours, make = torch_pruning_groups(model, graph), CRITERIA[criterion]
    found = importance(model, graph, make())
    for group in graph.groups:
        same = theirs(ours[group.name], groups)
        if "first" in criterion:  # theirs may have another first member: the same members in our order
            handlers = {(id(item.dep.layer), item.dep.handler): item for item in same.items}
            first = handlers[id(ours[group.name][0].dep.layer), ours[group.name][0].dep.handler]
            same = tp.dependency.Group()
            same.add_dep(first.dep, first.idxs)
            same[0].root_idxs = first.root_idxs
        expected = make()(same)
        if expected is None:
            assert group.name not in found
        else:
            assert found[group.name].shape == (group.units,)
            torch.testing.assert_close(found[group.name], expected, rtol=1e-4, atol=0)
            assert expected.std() > 1e-3 * expected.mean() > 0
    assert len(found) > 10


def squares(group: ChannelGroup, model: nn.Module, gradient: bool = False) -> Tensor:
    """Per unit the sum of squared weights, or of |weight * gradient|, in all that criteria look at. From the slots."""
    kinds = nn.modules.conv._ConvNd, nn.Linear, nn.BatchNorm2d, nn.LayerNorm
    total = torch.zeros(group.units, dtype=torch.float64)
    for slot in group.slots:
        owner, _, attribute = slot.tensor.rpartition(".")
        layer = model.get_submodule(owner) if slot.role in ("read", "write", "carry") else None
        if not isinstance(layer, kinds) or attribute != "weight":
            continue
        depthwise = isinstance(layer, kinds[0]) and 1 < layer.groups == layer.out_channels
        if depthwise or (gradient and isinstance(layer, nn.BatchNorm2d)):  # overlooked by the criteria
            continue
        weight = layer.weight.detach()
        values = (weight * layer.weight.grad).abs() if gradient else weight.square()
        per_channel = values.movedim(slot.axis, 0).reshape(weight.shape[slot.axis], -1).sum(1)
        repeats = layer.groups if slot.role == "read" and isinstance(layer, kinds[0]) else 1
        total += repeats * per_channel[slot.positions].sum(1)
    return total


def network(name: str) -> tuple[nn.Module, ChannelGraph, Any]:
    if name != "vit":
        return traced_case(name)
    model = randomised(VisionTransformer(16, 8, 2, 2, 16, 24, num_classes=5)).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    return model, surgery.trace(model, x), x


@pytest.mark.parametrize("name", [*WIDE, "vit"])
def test_what_torch_pruning_cannot_follow_is_scored(name: str) -> None:
    """Without a normalisation the score of a unit times its root channels is the sum over all of its weights."""
    model, graph, x = network(name)
    model(x).square().sum().backward()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    groups = torch_pruning_groups(model, graph)
    kinds = {"normalizer": None, "group_reduction": "sum"}
    for criterion, gradient in ((tp.importance.MagnitudeImportance, False), (tp.importance.TaylorImportance, True)):
        found = importance(model, graph, criterion(**kinds))
        assert found.keys() == graph.by_name.keys()
        for group in graph.groups:
            width = len(groups[group.name][0].idxs) / group.units
            expected = squares(group, model, gradient)
            torch.testing.assert_close(found[group.name].double() * width, expected, rtol=1e-5, atol=1e-9)
            assert found[group.name].shape == (group.units,)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for n, p in model.named_parameters():
        assert (p.grad is None) == (grads[n] is None)
        assert p.grad is None or torch.equal(p.grad, grads[n])
    assert not model.training


@pytest.mark.parametrize("name", [*WIDE, "vit"])
def test_every_criterion_scores_every_unit(name: str) -> None:
    model, graph, x = network(name)
    model(x).square().sum().backward()
    for kind, make in (*CRITERIA.items(), ("random", tp.importance.RandomImportance)):
        if kind == "fpgm" and name == "grouped":
            with pytest.raises(RuntimeError, match="Number of dimensions of repeat dims"):
                importance(model, graph, make())  # its own mistake: it repeats a matrix as if it were a vector
            continue
        found = importance(model, graph, make())
        if kind in ("magnitude", "taylor", "random"):
            assert found.keys() == graph.by_name.keys()
        assert found or kind == "bn scale", kind
        for scored, score in found.items():
            assert score.shape == (graph.by_name[scored].units,)
            assert score.isfinite().all()


@pytest.mark.parametrize("name", [*WIDE, "vit"])
def test_items_are_laid_out_as_torch_prunings(name: str) -> None:
    model, graph, _ = network(name)
    parameters = {id(p): n for n, p in model.named_parameters()}
    for group in torch_pruning_groups(model, graph).values():
        width = len(group[0].idxs)
        assert group[0].root_idxs == list(range(width))
        for item in group.items:
            assert len(item.idxs) == len(item.root_idxs)
            assert item.idxs == sorted(set(item.idxs))
            assert set(item.root_idxs) <= set(range(width))
            layer, node = item.dep.layer, item.dep.target
            if isinstance(layer, nn.Parameter):
                assert item.dep.handler == tp.prune_parameter_out_channels
                assert max(item.idxs) < layer.shape[node.pruning_dim]
                assert node.name == parameters[id(layer)]
            else:
                pruner = item.dep.handler.__self__
                size = pruner.get_in_channels if "in_channels" in item.dep.handler.__name__ else pruner.get_out_channels
                assert max(item.idxs) < size(layer)
        assert str(group)
        assert group.details()


def test_flattened_channels_count_for_the_channel_that_they_come_from() -> None:
    model = ZOO["flatten_to_linear"].build().double()
    graph = surgery.trace(model, ZOO["flatten_to_linear"].example())
    (group,) = torch_pruning_groups(model, graph).values()
    assert [item.dep.layer for item in group.items] == [model.a, model.head]
    assert group[1].idxs == list(range(6 * 36))
    assert group[1].root_idxs == [i // 36 for i in range(6 * 36)]


class FlatFirst(nn.Module):
    """A norm over flattened channels runs before one over the channels themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.flat, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm1d(6 * 36), nn.BatchNorm2d(6)
        self.head, self.other = nn.Linear(6 * 36, 5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.cat((self.head(self.flat(y.flatten(1))), self.other(self.norm(y).mean((2, 3)))), 1)


def test_scores_are_as_many_as_the_channels_where_a_longer_member_comes_first() -> None:
    """Criteria take the length of their result from the first member that they score."""
    model = randomised(FlatFirst()).double()
    graph = surgery.trace(model, ZOO["plain"].example())
    (score,) = importance(model, graph, tp.importance.BNScaleImportance()).values()
    assert score.mean() == pytest.approx(1)


def test_the_inputs_of_a_grouped_convolution_are_counted_through() -> None:
    model = ZOO["grouped"].build().double()
    graph = surgery.trace(model, ZOO["grouped"].example())
    groups = torch_pruning_groups(model, graph)
    (read,) = [item for item in groups["stem.0"].items if item.dep.layer is model.a]
    assert read.idxs == read.root_idxs == list(range(8))
    assert importance(model, graph, tp.importance.MagnitudeImportance())["stem.0"].shape == (4,)


def test_a_group_without_a_member_for_the_criterion_is_left_out() -> None:
    model = ZOO["residual"].build().double()
    graph = surgery.trace(model, ZOO["residual"].example())
    assert graph.by_name.keys() == {"stem.0", "a"}
    assert importance(model, graph, tp.importance.BNScaleImportance()).keys() == {"stem.0"}
