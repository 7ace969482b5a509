"""Gated weights are not kept for the backward pass, and the gradients are the same."""

import weakref

import pytest
import torch
from test_gated import traced
from torch import Tensor
from torch.func import functional_call

from diffprune import GatedModel, attach

NAMES = ("residual", "grouped", "tied_weight", "multihead_attention", "functional_conv", "layer_norm_mlp")


def gradients(gated: GatedModel, output: Tensor) -> dict[str, Tensor]:
    gated.zero_grad()
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in gated.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_kept_products(name: str) -> None:
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


def test_the_products_are_gone_after_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, x = traced("residual")
    gated = attach(model, graph).train()
    products: list[weakref.ref[Tensor]] = []
    original = GatedModel.gated_weights

    def seen(self: GatedModel, gates: Tensor) -> dict[str, Tensor]:
        weights = original(self, gates)
        products.extend(map(weakref.ref, weights.values()))
        return weights

    monkeypatch.setattr(GatedModel, "gated_weights", seen)
    output = gated(x)
    assert output.requires_grad
    assert products
    assert not any(product() is not None for product in products)
