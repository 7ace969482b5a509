"""The step is decided from costs that are given, and once from real ones."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import export
from export import alignment, probe
from export.alignment import CANDIDATES, WIDTHS, decide
from export.sessions import open_session
from export.settings import Settings


def staircase(step, noise=0.0, seed=0, power=2.0):
    generator = np.random.default_rng(seed)
    factors = {w: float(np.exp(noise * generator.standard_normal())) for w in WIDTHS}
    return {w: (-(-w // step) * step) ** power / 64**power * factors[w] for w in WIDTHS}


@pytest.mark.parametrize(("power", "noise"), [(2.0, 0.02), (1.5, 0.01)])
@pytest.mark.parametrize("step", CANDIDATES)
def test_every_staircase_is_recognised(step, power, noise):
    for seed in range(20):
        found = decide(staircase(step, noise, seed, power))
        assert (found.multiple, found.source) == (step, "probe")


@pytest.mark.parametrize(("step", "costs"), [
    (8, (1.565, 2.181, 1.547, 1.297, 1.299, 1.047, 0.454)),  # an AMD EPYC with AVX2: narrow layers cost less than p = 2
])
def test_real_costs_are_recognised(step, costs):
    found = decide(dict(zip(WIDTHS, costs, strict=True)))
    assert (found.multiple, found.source) == (step, "probe")


@pytest.mark.parametrize("noise", [0.25, 1.0])
def test_noise_leaves_the_decision_to_the_instruction_set(monkeypatch, noise):
    """Unless it happens to look like a staircase; and whatever it looks like, only known steps come out."""
    monkeypatch.setattr(alignment, "default_step", lambda: 8)
    found = [decide(staircase(step, noise, seed)) for step in CANDIDATES for seed in range(50)]
    assert {step.multiple for step in found} <= set(CANDIDATES)
    assert all(min(step.misfit.values()) <= alignment.GOOD_FIT for step in found if step.source == "probe")
    assert all(step.multiple == 8 for step in found if step.source == "instruction set")
    assert sum(step.source == "instruction set" for step in found) > 0.9 * len(found)


@pytest.mark.parametrize("costs", [dict.fromkeys(WIDTHS, 1.0), {w: 1 / w for w in WIDTHS}])
def test_what_is_no_staircase_is_left_to_the_instruction_set(monkeypatch, costs):
    monkeypatch.setattr(alignment, "default_step", lambda: 16)
    found = decide(costs)
    assert (found.multiple, found.source) == (16, "instruction set")


@pytest.mark.parametrize(("sets", "step"), [(("avx2", "avx512f"), 16), (("avx2",), 8), (("neon",), 8), ((), 8)])
def test_the_default_follows_the_instruction_set(monkeypatch, sets, step):
    monkeypatch.setattr(alignment, "instruction_sets", lambda: sets)
    assert export.default_step() == step


def test_a_real_probe_has_evidence_for_every_width():
    found = export.probe_step(seconds_budget=0.3)
    assert found.multiple in CANDIDATES
    assert tuple(found.evidence) == WIDTHS
    assert all(cost > 0 for cost in found.evidence.values())
    assert json.loads(json.dumps(found.as_dict()))["multiple"] == found.multiple


@pytest.mark.parametrize("step", [2 * step for step in CANDIDATES])
def test_wider_stacks_find_wider_steps(step):
    evidence = {2 * width: (-(-2 * width // step) * step) ** 2 for width in WIDTHS}
    assert alignment.decide(evidence, 2, 8, "tensor cores").multiple == step
    flat = alignment.decide(dict.fromkeys(evidence, 1.0), 2, 8, "tensor cores")
    assert (flat.multiple, flat.source) == (8, "tensor cores")


def test_torch_times_the_same_stacks():
    """What a GPU runs, here on the CPU."""
    state = torch.get_rng_state()
    with probe._networks([8, 16], Settings("cpu", 1, 3, 0, "eager")) as candidates:
        shapes = [tuple(candidate.run().shape) for candidate in candidates]
    assert shapes == [(3, 8, probe.SIDE, probe.SIDE), (3, 16, probe.SIDE, probe.SIDE)]
    assert torch.equal(torch.get_rng_state(), state)
    convolutions = [layer for layer in probe._network(8) if isinstance(layer, nn.Conv2d)]
    assert sum(layer.weight.numel() for layer in convolutions) == sum(
        np.prod(weight.dims) for weight in probe._stack(8, 0).graph.initializer
    )


def test_another_precision_is_refused_on_a_cpu():
    with pytest.raises(export.CannotMeasure, match="a step in fp16 was asked of the CPU"):
        export.probe_step(precision="fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_none_is_probed():
    with pytest.raises(export.DeviceMissing):
        export.probe_step(device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_a_gpu_is_probed(precision):
    found = export.probe_step(device="cuda", precision=precision, seconds_budget=0.5)
    assert tuple(found.evidence) == tuple(probe.GPU_SCALE * width for width in WIDTHS)
    assert found.source == "probe" or found.multiple == probe.TENSOR_CORES[precision]


def test_the_stacks_are_the_networks_they_claim_to_be(tmp_path):
    """Against torch: otherwise the probe might time something else."""
    model = probe._stack(8, seed=0)
    onnx.save(model, tmp_path / "stack.onnx")
    x = torch.randn(1, 8, probe.SIDE, probe.SIDE)
    y = x
    for weight in model.graph.initializer:
        y = torch.conv2d(y, torch.from_numpy(numpy_helper.to_array(weight).copy()), padding=1).relu()
    found = open_session(tmp_path / "stack.onnx").run(None, {"input": x.numpy()})[0]
    assert y.abs().max() > 0
    assert torch.allclose(torch.from_numpy(found), y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def test_a_step_that_was_not_measured_says_so():
    assert decide(staircase(8)).doubt is None
    text = decide(dict.fromkeys(WIDTHS, 1.0)).doubt
    assert text.startswith("which widths are fast here could not be measured clearly, so multiples of")
