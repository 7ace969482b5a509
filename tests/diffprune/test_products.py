"""Large gated weights are not kept for the backward pass, and the gradients are the same."""

import weakref
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointError, checkpoint
from zoo import traced

import surgery
from diffprune import GatedModel, attach
from diffprune.errors import GatesLost
from diffprune.products import SMALL, places_of, products
from diffprune.sparse import SparseModel

NAMES = ("residual", "grouped", "tied_weight", "multihead_attention", "functional_conv", "layer_norm_mlp")


def gradients(gated: GatedModel, output: Tensor) -> dict[str, Tensor]:
    gated.zero_grad()
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in gated.named_parameters() if p.grad is not None}


@dataclass
class Computed:
    """The products computed, and the most of them that lived at a time."""

    products: list[weakref.ref[Tensor]] = field(default_factory=list)
    most: int = 0


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    found, original = Computed(), GatedModel._gated_weight

    def seen(self: GatedModel, name: str, weight: Tensor, gates: Tensor) -> Tensor:
        weight = original(self, name, weight, gates)
        found.products.append(weakref.ref(weight))
        found.most = max(found.most, sum(product() is not None for product in found.products))
        return weight

    monkeypatch.setattr(GatedModel, "_gated_weight", seen)
    return found


@pytest.mark.parametrize("small", [0, SMALL])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_kept_products(name: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprune.products.SMALL", small)
    model, graph, x = traced(name)
    gated = attach(model, graph).train()
    torch.manual_seed(0)
    found = gradients(gated, gated(x))
    torch.manual_seed(0)
    gates = gated.sample()
    weights = {**gated.gated_weights(gates), **gated.norm_counts(gates)}
    wanted = gradients(gated, functional_call(gated.model, weights, (x,)))
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, msg=key)


def test_no_more_than_one_large_product_lives_at_a_time(computed: Computed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprune.products.SMALL", 0)
    model, graph, x = traced("residual")
    output = attach(model, graph).train()(x)
    forward = len(computed.products)
    assert forward > 2
    assert computed.most == 1
    output.sum().backward()
    assert len(computed.products) > forward
    assert computed.most == 1
    assert not any(product() is not None for product in computed.products)


@pytest.mark.parametrize(("width", "named"), [(512, r"2\.weight"), (16, r"a tensor of shape \(16, 16\)")])
def test_a_weight_that_changed_before_the_backward_pass_is_refused_as_torch_does(width: int, named: str) -> None:
    layers = nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width)
    model, x = nn.Sequential(*layers), torch.randn(4, 8, requires_grad=True)
    gated = attach(model, surgery.trace(model, x.detach())).train()
    first = gated(x)
    gated(x).sum().backward()
    with torch.no_grad():
        gated.model.get_parameter("2.weight").mul_(1.1)
    with pytest.raises(RuntimeError, match=rf"{named} was changed in place .* call backward\(\) before"):
        first.sum().backward()
    gated(x).sum().backward()


def test_small_products_are_computed_once(computed: Computed) -> None:
    model, graph, x = traced("residual")
    output = attach(model, graph).train()(x)
    forward = len(computed.products)
    assert forward > 2
    output.sum().backward()
    assert len(computed.products) == forward


def test_a_weight_tells_its_shape_without_a_product_and_fails_past_the_overrides() -> None:
    weight = torch.randn(3, 2, dtype=torch.float64)
    asked = []

    def compute(name: str) -> Tensor:
        asked.append(name)
        return 2 * weight

    with products({"w": weight}, {"w": "w"}, compute) as stand_in:
        w = stand_in["w"]
        assert (w.shape, w.dtype, w.dim(), w.numel()) == ((3, 2), torch.float64, 2, 6)
        assert not asked
        assert torch.equal(w.flatten(), 2 * weight.flatten())
        assert torch.equal(torch.stack([w, w]), torch.stack([2 * weight, 2 * weight]))
        assert asked == ["w"] * 3
        with torch._C.DisableTorchFunctionSubclass(), pytest.raises(NotImplementedError, match="past torch"):
            w + 1


class Checkpointed(nn.Module):
    """Computes its middle layer again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.training:
            y = checkpoint(lambda z: self.middle(z).relu(), y, use_reentrant=self.reentrant)
        else:
            y = self.middle(y).relu()
        return self.last(y)


@pytest.mark.parametrize(
    ("reentrant", "error", "words"),
    [(True, GatesLost, "switch activation checkpointing off"), (False, CheckpointError, "(?i)recomput")],
)
def test_activation_checkpointing_is_refused(reentrant: bool, error: type[Exception], words: str) -> None:
    model, x = Checkpointed(reentrant).eval(), torch.randn(2, 4)
    gated = attach(model, surgery.trace(model, x)).train()
    with pytest.raises(error, match=words):
        gated(x).sum().backward()


@pytest.mark.parametrize("kind", ["units", "weights"])
def test_a_module_with_two_names_keeps_its_weight(kind: str) -> None:
    twice = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), twice, nn.ReLU(), twice, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    x = torch.randn(2, 3, 9, 9)
    gated = (attach(model, surgery.trace(model, x)) if kind == "units" else SparseModel(model)).train()
    for _ in range(2):
        gated(x).sum().backward()
    assert isinstance(gated.model[2].weight, nn.Parameter)
    assert gated.model[4] is gated.model[2]
    assert gated.model[2].weight.grad is not None
    if kind == "units":  # all open as yet
        torch.testing.assert_close(gated.eval()(x), model(x))


def test_all_places_of_a_weight_are_found_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Sequential(shared), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = shared.weight
    assert places_of(model, ["0.weight", "3.weight"]) == {
        "0.weight": "0.weight", "2.weight": "0.weight", "3.weight": "3.weight",
    }  # fmt: skip
