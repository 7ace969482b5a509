"""Which sums layers enter: found through BatchNorm, in place or not, and only where the other summand came first."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffprune.sums import Operators, Summand, Watch, same_operators


class Two(nn.Module):
    """A stream that one of `forms` adds the output of `late` to."""

    def __init__(self, form: Callable[["Two", Tensor], Tensor]) -> None:
        super().__init__()
        self.early, self.late = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.form = nn.BatchNorm2d(3), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, F.relu(self.early(x)))


def in_place(net: Two, x: Tensor) -> Tensor:
    out = net.norm(net.late(x))
    out += x
    return F.relu(out, inplace=True)


def onto_the_stream(net: Two, x: Tensor) -> Tensor:
    y = net.norm(net.late(x))
    x += y
    return F.relu(x)


def shortcut_last(net: Two, x: Tensor) -> Tensor:
    return net.late(x) + 2 * x


def through_relu(net: Two, x: Tensor) -> Tensor:
    return F.relu(net.late(x)) + x


def through_relu_in_place(net: Two, x: Tensor) -> Tensor:
    return F.relu(net.late(x), inplace=True) + x


def twice(net: Two, x: Tensor) -> Tensor:
    y = net.late(x)
    y += 1.0
    y += x
    return y


def broadcast(net: Two, x: Tensor) -> Tensor:
    return net.late(x) + x.mean((2, 3), keepdim=True)


def sums(net: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, str], list[Any]]:
    found: dict[str, Tensor] = {}
    numbers: list[Any] = []

    def entered(summand: Summand) -> None:
        assert torch.allclose(mine[summand.layer], summand.mine, atol=1e-6)
        if summand.operator is not None:
            found[summand.layer] = summand.other.clone()
            numbers.append(summand.operator)

    mine: dict[str, Tensor] = {}
    for layer in (net.late, net.norm):
        layer.register_forward_hook(lambda _, args, output: mine.update(late=output.clone()))
    watch = Watch({"early": net.early, "late": net.late}, entered)
    with torch.no_grad(), watch.inside(net):
        net(x)
    return found, watch.norm_of, numbers


@pytest.mark.parametrize(
    ("form", "norm"),
    [
        (in_place, {"late": "norm"}), (onto_the_stream, {"late": "norm"}),
        (lambda net, x: net.late(x) + x, {}), (lambda net, x: x + net.late(x), {}),
        (lambda net, x: torch.add(x, net.norm(net.late(x))), {"late": "norm"}),
        (lambda net, x: x + F.dropout(net.norm(net.late(x)), 0.5, False), {"late": "norm"}),
        (lambda net, x: x + net.late(x).contiguous().to(x.dtype), {}),
    ],
)
def test_a_sum_is_found_with_the_other_summand(form: Any, norm: dict[str, str]) -> None:
    net, x = Two(form).eval(), torch.randn(2, 3, 4, 4)
    found, norm_of, numbers = sums(net, x)
    assert list(found) == ["late"]
    assert norm_of == norm
    stream = F.relu(net.early(x))
    torch.testing.assert_close(found["late"], stream)
    held: dict[int, Tensor] = {}
    with torch.no_grad(), Operators(lambda *told: held.update({told[0]: copy.deepcopy(told[3])})):
        net(x)
    assert torch.equal(held[numbers[0]], stream)


@pytest.mark.parametrize("form", [shortcut_last, through_relu, through_relu_in_place, twice, broadcast])
def test_what_a_layer_cannot_make_up_for_is_no_sum(form: Any) -> None:
    assert not sums(Two(form).eval(), torch.randn(2, 3, 4, 4))[0]


def test_hooks_are_gone_afterwards() -> None:
    net = Two(in_place).eval()
    with Watch({"late": net.late}, lambda summand: None).inside(net):
        net(torch.randn(2, 3, 4, 4))
    assert not any(module._forward_hooks for module in net.modules())


def test_networks_of_other_code_are_told_apart() -> None:
    a, b, c = Two(in_place).eval(), Two(in_place).eval(), Two(shortcut_last).eval()
    x = torch.randn(2, 3, 4, 4)
    assert same_operators(a, b, x)
    assert not same_operators(a, c, x)
