"""The oracle that users have: it accepts equal networks and refuses everything else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


X = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4)
REFUSED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any], str]] = {
    "value": (lambda x: x, lambda x: x + 1e-11, "output 0 differs by 5.0e-12 .* 1e-12 is allowed"),
    "second output": (lambda x: (x, x), lambda x: (x, 2 * x), "output 1 differs"),
    "shape": (lambda x: x, lambda x: x[:, :3], r"outputs are float64 \(3, 3\); float64 \(3, 4\) is asked"),
    "broadcast": (lambda x: x, lambda x: x[:1], r"outputs are float64 \(1, 4\)"),
    "count": (lambda x: x, lambda x: (x, x), r"outputs are \(float64"),
    "structure": (lambda x: (x, x), lambda x: {"a": x, "b": x}, r"outputs are \{'a': float64"),
    "nan": (lambda x: x, lambda x: x / 0 * 0, "not finite"),
    "nan in the reference": (lambda x: x / 0 * 0, lambda x: x, "not finite"),
    "nan in both": (lambda x: x * float("nan"), lambda x: x * float("nan"), "not finite"),
    "infinite reference": (lambda x: x / 0, lambda x: x / 0, "not finite"),
    "constant": (torch.ones_like, torch.ones_like, "output 0 of the reference is constant"),
    "zero": (torch.zeros_like, torch.zeros_like, "constant"),
    "nothing": (lambda x: None, lambda x: None, "no tensor"),
    "dtype": (lambda x: x, lambda x: x.float(), "outputs are float32"),
}


@pytest.mark.parametrize(("masked", "small", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_differs_is_refused(masked: Any, small: Any, message: str) -> None:
    with pytest.raises(surgery.NotEqual, match=message):
        surgery.check_equal(Apply(masked), Apply(small), X)


class Squeezing(nn.Module):
    """Loses the axis of its channels where one is left of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).squeeze())


def test_a_cut_network_that_does_not_run_is_refused_with_the_reason() -> None:
    model, x = Squeezing(), torch.randn(3, 4)
    graph = surgery.trace(model, x)
    (group,) = graph.groups
    keep = {group.name: torch.tensor([False, True, False])}
    with pytest.raises(surgery.NotEqual, match=r"cut network does not run: RuntimeError: mat1.*(?s:.*)keep two"):
        surgery.check_equal(surgery.mask(model, graph, keep), surgery.cut(model, graph, keep), x)


def test_equal_networks_are_accepted_with_their_error() -> None:
    assert surgery.check_equal(Apply(lambda x: [x, None]), Apply(lambda x: [x, None]), X) == 0.0
    error = surgery.check_equal(Apply(lambda x: x), Apply(lambda x: x * (1 + 1e-13)), X)
    assert 0 < error < 2e-13
    assert surgery.check_equal(Apply(lambda x: x), Apply(lambda x: 1.25 * x), X, tolerance=0.3) == pytest.approx(0.25)


def test_a_single_number_and_whole_numbers_can_be_compared() -> None:
    assert surgery.check_equal(Apply(torch.sum), Apply(torch.sum), X) == 0.0
    counts = Apply(lambda x: (x > 0).sum(1))
    assert surgery.check_equal(counts, counts, X) == 0.0
    with pytest.raises(surgery.NotEqual, match="output 0 differs"):
        surgery.check_equal(counts, Apply(lambda x: (x > 0.9).sum(1)), X)


def test_the_error_is_relative_to_the_output() -> None:
    with pytest.raises(surgery.NotEqual, match=r"differs by 5\.0e-01"):
        surgery.check_equal(Apply(lambda x: x * 1e-9), Apply(lambda x: x * 1.5e-9), X)


def test_half_precision_has_its_own_tolerance() -> None:
    x = X.bfloat16()
    assert surgery.check_equal(Apply(lambda x: x), Apply(lambda x: x * 1.01), x) < 0.1
    with pytest.raises(surgery.NotEqual, match="1e-01 is allowed"):
        surgery.check_equal(Apply(lambda x: x), Apply(lambda x: x * 2), x)


def test_positional_and_named_inputs() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - 2 * b

    assert surgery.check_equal(Two(), Two(), (X, X)) == 0.0
    assert surgery.check_equal(Two(), Two(), {"b": X, "a": 3 * X}) == 0.0


def test_mode_and_random_state_come_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).double()
    model[0].eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert surgery.check_equal(model, model, X) == 0.0
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("conv", ["tf32", "ieee"])
def test_networks_are_compared_without_tf32_and_its_switches_come_back(conv: str) -> None:
    """On a GPU convolutions multiply with 10 bits by default, and a cut network differs by 4e-4 from its gated one."""
    backends, seen = torch.backends, []

    def switches() -> list[str]:
        return [kind.fp32_precision for kind in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)]

    def watching(x: Tensor) -> Tensor:
        seen.append(switches())
        return x

    default = backends.cudnn.conv.fp32_precision
    try:
        backends.cudnn.conv.fp32_precision = conv
        before = switches()
        surgery.check_equal(Apply(watching), Apply(watching), X)
        assert switches() == before
    finally:
        backends.cudnn.conv.fp32_precision = default
    assert seen == [["ieee"] * 3] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_a_cut_network_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 5)).cuda()
    x = torch.randn(2, 3, 5, 5, device="cuda")
    graph = surgery.trace(model, x)
    keep = {group.name: torch.arange(group.units) % 3 > 0 for group in graph.groups}
    assert surgery.check_equal(surgery.mask(model, graph, keep), surgery.cut(model, graph, keep), x) < 1e-5
