"""A fast cross-section of torchvision: residual, squeeze-and-excite, dense, grouped, fire and inception widths."""

import subprocess
import sys

import pytest
import torch
import torchvision
from counting import macs, params
from oracle import gated_output, random_keep, relative_error
from torch import nn
from zoo import short_densenet

import surgery

FREE = {"resnet18": 12, "mobilenet_v3_small": 27, "densenet": 16, "regnet_y_400mf": 53, "squeezenet1_1": 25,
        "googlenet": 57}
"""How many groups each has at least."""

LARGE = ("regnet_y_400mf", "googlenet")


def trained_looking(name: str) -> nn.Module:
    """Weights as initialised; statistics and affine parameters of norms far from the identity."""
    plain = {"init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    model = short_densenet() if name == "densenet" else torchvision.models.get_model(name, weights=None, **plain)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.6, 1.4), (module.bias, -0.3, 0.3), (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                nn.init.uniform_(tensor, low, high)  # type: ignore[arg-type]
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.soak] * (name in LARGE)) for name in FREE])
def test_a_random_cut_of_a_real_network_is_exact(name: str) -> None:
    model = trained_looking(name).train()
    x = torch.randn(2, 3, 64, 64)
    graph = surgery.trace(model, x)
    assert all(module.training for module in model.modules())
    assert len(graph.groups) >= FREE[name]
    assert {pin.reason for pin in graph.pinned} == {"model input", "model output"}

    keep = random_keep(graph, 0, share=0.6)
    small = surgery.cut(model, graph, keep).eval()
    expected = gated_output(model.eval(), graph, keep, x)
    with torch.no_grad():
        assert relative_error(expected, small(x)) < 1e-5
        assert relative_error(model(x), small(x)) > 1e-2, "the cut changed nothing"
    assert surgery.check_equal(surgery.mask(model, graph, keep), small, x) < 1e-5
    assert surgery.SizeModel(graph).of(keep) == surgery.Size(params(small), macs(small, x))
    assert params(small) < 0.75 * params(model)


PEAKS = """
import torch, torchvision, surgery
peak = lambda: next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
model, x = torchvision.models.vgg11(weights=None, init_weights=False).eval(), torch.randn(1, 3, 224, 224)
with torch.no_grad():
    model(x)
print(peak())
surgery.trace(model, x)
print(peak())
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read off /proc")
def test_a_trace_takes_at_most_twice_the_memory_of_a_forward() -> None:
    printed = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True).stdout
    forward, trace = map(int, printed.split())
    assert forward < trace <= 2 * forward
