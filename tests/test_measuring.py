"""The benchmarks of the measuring: their files have the ratio they are given out for, and their load ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch

from benchmarks import gpu, measuring
from benchmarks.cells import stored
from benchmarks.load import BURN, loaded


def test_twice_the_layers_are_twice_the_nodes_on_the_same_weight() -> None:
    once, twice = (measuring.stack(depth).graph for depth in (3, 6))
    assert len(twice.node) == 2 * len(once.node) == 12
    assert len(once.initializer) == len(twice.initializer) == 1
    assert once.initializer[0].raw_data == twice.initializer[0].raw_data
    onnx.checker.check_model(measuring.stack(3), full_check=True)


def test_the_load_ends_with_its_block_even_after_an_error() -> None:
    load = loaded(2)
    children = load.__enter__()
    assert children
    assert all(child.poll() is None for child in children)
    assert not load.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert all(child.poll() is not None for child in children)


def test_the_load_ends_with_its_time_and_with_its_parent() -> None:
    for parent, seconds in ((os.getpid(), "0.1"), (1 << 30, "60")):
        code = [sys.executable, "-c", BURN, str(parent), seconds]
        assert subprocess.run(code, timeout=20).returncode == 0


def test_a_killed_benchmark_leaves_no_load() -> None:
    code = (
        "import sys\nfrom benchmarks.load import loaded\n"
        "with loaded(1) as children:\n    print(children[0].pid, flush=True)\n    sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("ratio", "load"), [(1, False), (2, True)])
def test_a_trial_is_a_row_of_the_table(ratio: int, load: bool) -> None:
    cell = {"ratio": ratio, "depth": 2, "load": load, "trial": 0, "seconds": 0.1}
    found = cell | measuring.measure(cell)
    assert found["low"] <= found["speedup"] <= found["high"]
    assert found["rounds"] >= 30
    held = int(found["low"] <= ratio <= found["high"])
    row = measuring.table([found]).splitlines()[2]
    assert row.startswith(f"| {ratio} | {'loaded' if load else 'quiet'} | {held} / 1 |")


def test_the_table_counts_what_is_held_and_how_far_off_it_is() -> None:
    trials = [(1.0, 0.98, 1.01), (1.04, 1.01, 1.05)]
    kind = {"ratio": 1, "load": False, "verdict": "v"}
    rows = [{**kind, "speedup": value, "low": low, "high": high} for value, low, high in trials]
    assert "| 1 | quiet | 1 / 2 | 1 / 2 | 2.0% | 4.0% |" in measuring.table(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_its_benchmark_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="finds no CUDA device: nothing was measured"):
        gpu.main()


def test_a_gpu_cell_holds_a_comparison_or_the_reason_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with a network of two layers: all but the clock and the device is what runs on a GPU."""

    def tiny(name: str, weights: None) -> torch.nn.Module:
        pooled = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 4)]
        return torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, stride=32), torch.nn.ReLU(), *pooled)

    monkeypatch.setattr("torchvision.models.get_model", tiny)
    gpu.networks.cache_clear()
    cell = {"model": "tiny", "batch": 2, "precision": "fp32", "runtime": "eager"}
    cell |= {"round_to": 8, "seconds": 0.1, "seed": 0}
    found = cell | gpu.measure(cell, device="cpu")
    failed = {**cell, "runtime": "cuda-graph"}
    failed |= gpu.measure(failed, device="cpu")
    filed = {**cell, "runtime": "onnx"} | gpu.measure({**cell, "runtime": "onnx"}, device="cpu")
    gpu.networks.cache_clear()
    gpu.files.cache_clear()
    assert found["macs"] == filed["macs"] > 1
    for one in (found, filed):
        assert one["low"] <= one["speedup"] <= one["high"]
    first, second = gpu.table([found, failed]).splitlines()[2:]
    assert first.startswith("| tiny | 2 | fp32 | eager | ")
    assert second == "| tiny | 2 | fp32 | cuda-graph | runtime 'cuda-graph' asked on cpu |  |  |  |"


def test_committed_results_of_the_measuring_give_their_table() -> None:
    _, results = stored(measuring.RESULTS)
    assert measuring.table(results) in (Path(__file__).parents[1] / "docs" / "latency.md").read_text()


def test_committed_results_of_the_gpu_give_their_table() -> None:
    _, results = stored(gpu.RESULTS)
    assert gpu.table(results) in (Path(__file__).parents[1] / "docs" / "latency.md").read_text()
