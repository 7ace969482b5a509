"""A speed-up asked of another runtime than onnxruntime: by the same way, measured there, reported and verified."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from newcomer import MODULE, typed, working_in
from test_stopwatch import Wide

import export
from diffprune import Budget, compress, verification
from diffprune.errors import BadConfig, NotVerified
from diffprune.manifest import read_manifest
from diffprune.target import target
from export import Settings, compare_networks

EAGER = Settings(runtime="eager")
"""In the place of a GPU's CUDA graphs: torch as well."""


def test_a_gpu_is_measured_in_torch_and_a_cpu_in_onnxruntime() -> None:
    assert target("cuda", batch=8, precision="fp16") == Settings("cuda", 1, 8, 0, "cuda-graph", "fp16")
    assert target(threads=2) == Settings("cpu", 2, 1, 0, "onnx", "fp32")
    with pytest.raises(BadConfig, match="a latency in tf32 was asked of the CPU"):
        target(precision="tf32")


@pytest.mark.soak
def test_compress_meets_what_is_measured_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("diffprune.stopwatch.SECONDS", 0.2)
    monkeypatch.setattr("diffprune.pipeline.target", lambda *given, **how: EAGER)
    monkeypatch.setattr(export, "compare", None)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        export, "compare_networks", lambda *nets, **how: asked.append(how) or compare_networks(*nets, **how)
    )
    torch.manual_seed(0)
    x, labels = torch.randn(64, 3, 16, 16), torch.arange(64) % 5
    result = compress(Wide(), [(x, labels)], [(x, labels)], budget=Budget(speedup=1.5), epochs=0, round_to=16)
    assert {how["runtime"] for how in asked} == {"eager"}
    budget = result.report["budget"]
    assert budget["low"] <= budget["reached"] <= budget["high"]
    assert budget["reached"] >= 1.5
    assert result.report["macs"]["pruned"] < result.report["macs"]["dense"] / 1.2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_run_reports_both_and_verify_says_what_it_could_not_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffprune.run.require_devices", lambda config: None)
    monkeypatch.setattr("diffprune.preparation.target", lambda *given, **how: EAGER)
    with working_in(tmp_path):
        words = f"compress --model {MODULE}:factory --data digits --image-size 8 --epochs 0 --macs 0.5 --round-to 8"
        outcome = typed(*words.split(), "--latency-device", "cuda", "--output", "runs/gpu")
        assert outcome.code == 0, outcome.err
        assert "Latency, cuda" in outcome.out
        report = json.loads(Path("runs/gpu/report.json").read_text())
        stored = json.loads(Path("runs/gpu/latency-cuda.json").read_text())
        assert report["latency"]["cuda"]["speedup"] == stored["speedup"]
        assert stored["dense"]["runtime"] == "eager"
        assert json.loads(Path("runs/gpu/latency.json").read_text())["dense"]["runtime"] == "onnx"
        assert "on this GPU" in report["verdict"]
        assert "what follows is onnxruntime on this CPU" in typed("explain", "runs/gpu").out
        verified = typed("verify", "runs/gpu").out
        assert "pass  report, cuda" in verified
        assert re.search(r"^skip  speed-up, cuda +claimed .* there is no GPU here to measure it on$", verified, re.M)
        assert re.search(r"^skip  parity, dense.onnx +its weights are not part of the run", verified, re.M)
        assert "not checked: parity, dense.onnx, speed-up, cuda" in verified
        assert "everything holds" not in verified
        stored["speedup"] *= 2
        Path("runs/gpu/latency-cuda.json").write_text(json.dumps(stored))
        with pytest.raises(NotVerified, match=r"latency-cuda\.json says speedup"):
            verification._consistent(Path("runs/gpu"), read_manifest(Path("runs/gpu")), "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_speed_up_on_a_gpu(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import resnet18

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    x, labels = torch.randn(8, 3, 224, 224), torch.arange(8) % 5
    result = compress(
        resnet18(num_classes=5), [(x, labels)], [(x, labels)], budget=Budget(speedup=1.5), epochs=0, device="cuda",
        latency_device="cuda", latency_batch=64, latency_precision=precision,
    )  # fmt: skip
    assert 1.5 <= result.report["budget"]["reached"] <= 1.6
