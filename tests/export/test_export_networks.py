"""Latency of networks in torch: one rule for every runtime, and torch as it was afterwards."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from onnxruntime import get_available_providers
from tiny_networks import TwoInputs, plain
from torch import nn

import export
from export.networks import network_candidate, tf32, torch_as_asked
from export.settings import Settings


class Watching(nn.Module):
    """Notes how it is called."""

    seen = SimpleNamespace()

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        assert not self.training
        state = {"threads": torch.get_num_threads(), "inference": torch.is_inference_mode_enabled()}
        self.seen.__dict__.update(state, shape=tuple(x.shape), dtype=x.dtype, weights=self.linear.weight.dtype)
        return self.linear(x)


class Printing(nn.Module):
    def forward(self, x):
        print("a side effect, which no graph can hold")
        return x.sum(1)


def settings(**changes):
    return Settings(**{"device": "cpu", "threads": 1, "batch": 1, "seed": 0, "runtime": "eager", **changes})


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_a_network_runs_as_asked_and_torch_is_as_before(precision, dtype):
    model, before = Watching().double(), torch.get_num_threads()
    found = export.measure_network(
        model, torch.randn(2, 3), threads=before + 1, batch=5, precision=precision, seconds=0.1
    )
    seen = Watching.seen
    assert (seen.threads, seen.inference, seen.shape) == (before + 1, True, (5, 3))
    assert seen.dtype == seen.weights == dtype
    assert (found.runtime, found.precision, found.threads, found.batch) == ("eager", precision, before + 1, 5)
    assert found.inputs[0].as_dict() == {
        "name": "input_0", "shape": [5, 3], "type": str(dtype), "values": "as given",
    }
    assert torch.get_num_threads() == before
    assert model.training
    assert model.linear.weight.dtype == torch.float64
    assert len(found.samples) >= 30


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(export.CannotMeasure, match="does not run as eager: RuntimeError"):
        export.measure_network(Watching(), torch.randn(1, 4), threads=before + 1)
    assert torch.get_num_threads() == before


def test_two_networks_are_compared_like_two_files():
    found = export.compare_networks(plain(48), plain(4), torch.randn(1, 3, 24, 24), seconds=0.5)
    assert found.speedup == pytest.approx(found.dense.median / found.small.median)
    assert found.low <= found.speedup <= found.high
    assert found.dense.runtime == found.small.runtime == "eager"
    assert found.noise.low <= found.noise.value <= found.noise.high


def test_several_inputs_keep_their_types():
    given = torch.randn(1, 6), torch.tensor([3])
    found = network_candidate(TwoInputs(), given, settings(batch=4, precision="fp16"))
    assert [(spec.shape, spec.type) for spec in found.inputs] == [((4, 6), "torch.float16"), ((4,), "torch.int64")]


@pytest.mark.parametrize("ours", [True, False])
def test_tf32_is_switched_for_a_while(ours):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with tf32(ours):
        assert matmul.allow_tf32 == cudnn.allow_tf32 == ours
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


@pytest.mark.parametrize("setting", [("conv", "ieee"), ("rnn", "ieee"), ("matmul", "tf32"), ("matmul", "ieee")])
def test_tf32_comes_back_as_torchs_newer_switches_had_it(setting):
    name, precision = setting
    kinds = {"conv": torch.backends.cudnn.conv, "rnn": torch.backends.cudnn.rnn, "matmul": torch.backends.cuda.matmul}
    default = {kind: kinds[kind].fp32_precision for kind in kinds}
    try:
        kinds[name].fp32_precision = precision
        for ours in (False, True):
            with tf32(ours):
                assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == ours
            assert {kind: kinds[kind].fp32_precision for kind in kinds} == default | {name: precision}
    finally:
        for kind, value in default.items():
            kinds[kind].fp32_precision = value


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_the_compiled_network_is_compiled_or_refused(monkeypatch):
    """One graph, whatever else is compiled in this process and whatever torch is told to swallow."""
    image, given = torch.randn(1, 3), settings(runtime="compile")
    with torch_as_asked(given):
        for _ in range(2):
            model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
            answer = network_candidate(model, image, given).run()
            assert torch.allclose(answer, model(image), atol=1e-6)
        monkeypatch.setattr(torch._dynamo.config, "suppress_errors", True)
        with pytest.raises(export.CannotMeasure, match="does not run as compile: Unsupported"):
            network_candidate(Printing(), image, given)
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # as TORCHDYNAMO_DISABLE=1 does
        with pytest.raises(export.CannotMeasure, match="compiled 0 graphs of the network"):
            network_candidate(model, image, given)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setitem(os.environ, "CXX", "absent-c++")
    with pytest.raises(export.CannotMeasure, match=r"needs a C\+\+ compiler; there is no absent-c\+\+"):
        export.measure_network(Watching(), torch.randn(1, 3), runtime="compile")


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"runtime": "onnx"}, "'onnx' does not run a network"),
        ({"runtime": "jit"}, "runtime 'jit' is not known"),
        ({"runtime": "cuda-graph"}, "runtime 'cuda-graph' asked on cpu"),
        ({"precision": "tf32"}, "precision 'tf32' asked on cpu"),
        ({"precision": "int4"}, "precision 'int4' is not known"),
        ({"device": "tpu"}, "device 'tpu' is not known"),
        ({"threads": 0}, "0 threads asked"),
        ({"threads": "2"}, "2 threads asked"),
        ({"batch": 1.5}, "batch 1.5 asked"),
        ({"seed": -1}, "seed -1 asked"),
        ({"batch": 0}, "batch 0 asked"),
        ({"seconds": 0.0}, r"0\.0 seconds asked"),
    ],
)
def test_the_impossible_is_refused(options, fact):
    before = torch.get_num_threads()
    for attempt in (
        lambda: export.measure_network(Watching(), torch.randn(1, 3), **options),
        lambda: export.compare_networks(Watching(), Watching(), torch.randn(1, 3), **options),
    ):
        with pytest.raises(export.CannotMeasure, match=fact):
            attempt()
    assert torch.get_num_threads() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("runtime", ["eager", "compile", "cuda-graph"])
def test_without_a_gpu_nothing_runs_in_its_place(runtime):
    with pytest.raises(export.DeviceMissing, match="finds no CUDA device"):
        export.measure_network(Watching(), torch.randn(1, 3), device="cuda", runtime=runtime)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize("runtime", ["eager", "cuda-graph"])
def test_networks_on_a_gpu(runtime, precision):
    given = settings(device="cuda", runtime=runtime, precision=precision, batch=4)
    model, image = plain(16), torch.randn(1, 3, 12, 12)
    with torch_as_asked(given):
        candidate = network_candidate(model, image, given)
        answer = candidate.run()
        output = answer if runtime == "eager" else answer[1]
        torch.cuda.synchronize()
    assert torch.allclose(output[0].float().cpu(), model.eval()(image)[0], atol=0.05, rtol=0.05)
    found = export.compare_networks(
        plain(64), model, image, device="cuda", runtime=runtime, precision=precision, batch=4, seconds=0.5
    )
    assert (found.dense.device, found.dense.precision, found.dense.runtime) == ("cuda", precision, runtime)
    assert found.machine.gpu
    assert found.low <= found.speedup <= found.high


@pytest.mark.gpu
@pytest.mark.skipif("CUDAExecutionProvider" not in get_available_providers(), reason="no onnxruntime-gpu here")
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_files_on_a_gpu(files, precision):
    found = export.compare(
        files["dense"].path, files["small"].path, device="cuda", batch=4, precision=precision, seconds=0.5
    )
    assert (found.dense.device, found.dense.precision) == ("cuda", precision)
