"""The benchmarks' own parts, on the real networks and images where they are at hand."""

import json
import os
from pathlib import Path

import pytest
import torch

import surgery
from benchmarks.cells import markdown, run_cells
from benchmarks.cifar10 import table
from benchmarks.cifar_resnet import CifarResNet, pretrained
from diffprune.data import load_data
from diffprune.recover import accuracy
from surgery import SizeModel

DATA = Path(os.environ.get("DIFFPRUNE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def test_cells_are_written_one_by_one_and_never_measured_twice(tmp_path: Path) -> None:
    path, calls = tmp_path / "results" / "some.json", []

    def measure(cell: dict[str, int]) -> dict[str, int]:
        calls.append(cell["seed"])
        if cell["seed"] == 2:
            raise KeyboardInterrupt
        return {"answer": 10 * cell["seed"]}

    with pytest.raises(KeyboardInterrupt):
        run_cells(path, [{"seed": 0}, {"seed": 1}, {"seed": 2}], measure)
    assert [c["answer"] for c in json.loads(path.read_text())["cells"]] == [0, 10]
    assert run_cells(path, [{"seed": 1}, {"seed": 3}], measure) == [
        {"seed": 1, "answer": 10},
        {"seed": 3, "answer": 30},
    ]
    assert calls == [0, 1, 2, 3]


def test_a_markdown_table_has_its_head_first() -> None:
    assert markdown(("a", "b"), [("1", "2")]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


def test_committed_results_give_their_table() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "cifar10.json"
    results = json.loads(path.read_text())["cells"]
    lines = table(results).splitlines()
    assert len(lines) == 2 + len({(r["depth"], r["macs"], r["epochs"], r["round_to"]) for r in results})
    assert lines[2] in (path.parents[2] / "README.md").read_text()


def test_what_shortcuts_pad_is_pinned_and_all_else_is_free() -> None:
    model = CifarResNet(3).double()
    graph = surgery.trace(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    inside = {f"layer{i}.{j}.conv1": 16 << i - 1 for i in (1, 2, 3) for j in range(3)}
    assert {g.name: g.units for g in graph.groups} == {"conv1": 16, **inside}
    padded = {pin.where: pin.channels for pin in graph.pinned if "pads" in pin.reason}
    assert padded["layer2.0.conv2"] == (*range(8), *range(24, 32))
    stages = 6 * 16 * 16 * 9 * 1024 + (16 * 32 + 5 * 32 * 32) * 9 * 256 + (32 * 64 + 5 * 64 * 64) * 9 * 64
    assert SizeModel(graph).dense.macs == 3 * 16 * 9 * 1024 + stages + 64 * 10


@pytest.mark.skipif(not (DATA / "weights").is_dir(), reason="the CIFAR-10 images and weights are not at hand")
def test_published_weights_reach_their_accuracy_and_a_tenth_can_go() -> None:
    model = pretrained(20, DATA)
    data = load_data(f"cifar10:{DATA / 'cifar10'}", batch=500)
    some = [batch for batch, _ in zip(data.val, range(4), strict=False)]
    right, count = accuracy(model, some)
    assert count == 2000
    assert abs(right - 0.9173) < 0.02
    graph = surgery.trace(model, some[0][0][:2])
    keep = {g.name: torch.arange(g.units) >= g.units // 8 for g in graph.groups}
    small = surgery.cut(model, graph, keep)
    assert surgery.check_equal(surgery.mask(model, graph, keep), small, some[0][0][:16]) < 1e-5
    assert accuracy(small, some)[0] == accuracy(surgery.mask(model, graph, keep), some)[0]
