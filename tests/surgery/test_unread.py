"""What single weights leave unread goes, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models import VisionTransformer, resnet18

import surgery


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 5)
    ).eval()


def kept(model: nn.Module, x: Tensor) -> list[int]:
    graph = surgery.trace(model, x)
    keep = surgery.unread(model, graph)
    small = surgery.cut(model, graph, keep)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)
    return [int(flags.sum()) for flags in keep.values()]


def test_what_is_unread_goes_and_what_only_that_reads() -> None:
    model, x = chain(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        model[5].weight[:, :8] = 0  # nobody reads channels 0 and 1 of the second convolution
        model[2].weight[2:, 3] = 0  # only these two read channel 3 of the first
    assert kept(model, x) == [7, 4]


def test_a_single_weight_is_enough_to_stay() -> None:
    model, x = chain(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        model[5].weight[:, :4] = 0
        model[5].weight[3, 2] = 0.5
    assert kept(model, x) == [8, 6]


def test_one_unit_stays_where_all_goes_through() -> None:
    model, x = chain(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        model[5].weight.zero_()
    assert kept(model, x) == [8, 1]


def small_vit() -> nn.Module:
    model = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
    nn.init.normal_(model.heads.head.weight)
    return model


@pytest.mark.parametrize("make", [pytest.param(resnet18, marks=pytest.mark.soak), small_vit])
def test_magnitude_pruning_of_single_weights(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(1, 3, 32, 32)
    layers = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, _ in layers:  # some inputs matter little
        shape = [1, -1] + [1] * (layer.weight.dim() - 2)
        layer.weight.data *= torch.logspace(-3, 0, layer.weight.shape[1]).view(shape)
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.7)
    for layer, _ in layers:
        prune.remove(layer, "weight")
    graph = surgery.trace(model, x)
    keep = surgery.unread(model, graph)
    small = surgery.cut(model, graph, keep)
    assert surgery.SizeModel(graph).of(keep).params < 0.9 * surgery.SizeModel(graph).dense.params
    scale = model(x).abs().max()
    assert (small(x) - model(x)).abs().max() < 1e-5 * scale
