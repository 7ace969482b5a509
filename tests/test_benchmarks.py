"""The benchmarks' own parts, on the real networks and images where they are at hand."""

import json
import os
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn

import export
import surgery
from benchmarks import coverage
from benchmarks.cells import markdown, processor, run_cells, stored
from benchmarks.cifar_resnet import CifarResNet
from benchmarks.libraries import LIBRARIES
from benchmarks.parents import PARENTS
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
        {"seed": 1, "answer": 10, **processor()},
        {"seed": 3, "answer": 30, **processor()},
    ]
    assert calls == [0, 1, 2, 3]


def test_a_failure_is_kept_until_the_next_call_measures_again(tmp_path: Path) -> None:
    path, answers = tmp_path / "some.json", iter([{"failure": "no"}, {"answer": 2}, {"answer": 1}])
    cells = [{"seed": 1}, {"seed": 2}]
    assert run_cells(path, cells, lambda cell: next(answers)) == [
        {"seed": 1, "failure": "no", **processor()},
        {"seed": 2, "answer": 2, **processor()},
    ]
    again = run_cells(path, cells, lambda cell: next(answers))
    assert again == [{"seed": 1, "answer": 1, **processor()}, {"seed": 2, "answer": 2, **processor()}]
    assert sorted(stored(path)[1], key=lambda r: r["seed"]) == again


def test_a_file_keeps_its_first_machine_and_a_cell_its_own_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.json"
    run_cells(path, [{"seed": 0}], lambda cell: {})
    first = stored(path)[0]
    other = replace(export.this_machine(), cpu="another", isa=("neon",))
    monkeypatch.setattr("benchmarks.cells.this_machine", lambda: other)
    run_cells(path, [{"seed": 1}], lambda cell: {})
    machine, found = stored(path)
    assert machine == first
    assert found[1]["cpu"] == "another, neon" != found[0]["cpu"]


def test_several_workers_share_a_file_and_lose_nothing(tmp_path: Path) -> None:
    def work(worker: int) -> None:
        cells: list[dict[str, Any]] = [{"worker": worker, "seed": seed} for seed in range(8)]
        run_cells(tmp_path / "all.json", cells, lambda cell: {"found": cell["seed"]})

    workers = [Thread(target=work, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    _, cells = stored(tmp_path / "all.json")
    assert {(c["worker"], c["seed"]) for c in cells} == {(w, s) for w in range(4) for s in range(8)}


def test_a_markdown_table_has_its_head_first() -> None:
    assert markdown(("a", "b"), [("1", "2")]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_committed_coverage_gives_its_document(name: str) -> None:
    library = LIBRARIES[name]
    machine, results = stored(library.results)
    text = library.document.read_text()
    assert text == coverage.document(library, machine, results)
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + len(results)
    assert len(library.names) == len(set(library.names)) == {"torchvision": 86, "timm": 94}[name]


class Cumulative(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1)


def small_network(name: str, **options: object) -> nn.Module:
    """Six channels that are free, and six that are not: each is added to all later ones."""
    free = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    return nn.Sequential(*free, nn.Conv2d(6, 6, 3, stride=8), Cumulative(), *pooled)


def test_coverage_measures_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models.get_model", small_network)
    row = {"model": "small", "seeds": [0, 1]}
    row |= coverage.measure(row, LIBRARIES["torchvision"])
    assert "failure" not in row
    assert (row["groups"], row["units"], sum(row["pinned"].values())) == (1, 6, 6)
    assert row["free_macs"] == pytest.approx(1, abs=1e-3)  # all but the 24 of the last layer
    assert 0 <= row["cut_error"] < 1e-5
    assert 0 <= row["cut_error_double"] < 1e-12
    assert 0 <= row["onnx_error"] < 1e-4
    assert row["params"] > 1
    assert row["macs"] > 1
    assert coverage.table([row]).splitlines()[2].startswith("| small | 1 | 6 | 6 | 100.0% | ")


def test_coverage_records_a_failure_beside_what_was_found_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models.get_model", small_network)
    monkeypatch.setattr("export.to_onnx", lambda *_: (_ for _ in ()).throw(OSError("no | space\nleft")))
    row = {"model": "small", "seeds": [0]}
    row |= coverage.measure(row, LIBRARIES["torchvision"])
    assert row["units"] == 6
    assert "onnx_error" not in row
    assert coverage.table([row]).endswith(" |  | 1 | OSError: no \\| space |")


def test_a_coverage_keep_touches_every_group_and_empties_none() -> None:
    graph = surgery.trace(small_network("small").eval(), torch.randn(2, 3, 32, 32))
    kept = {int(coverage.random_keep(graph, seed)["0"].sum()) for seed in range(50)}
    assert kept == {2, 3, 4}  # 25 to 75 % of 6, rounded


def test_coverage_demands_the_predicted_parameters_and_gradients() -> None:
    with pytest.raises(ValueError, match="the cut network has 20 parameters; the size model predicts 19"):
        coverage._check_params(19, nn.Linear(4, 4))
    unused = nn.Sequential(nn.Linear(4, 4))
    unused[0].register_parameter("spare", nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match=r"0\.spare has no gradient"):
        coverage.trained_(unused, torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"0\.weight has an infinite gradient"):
        coverage.trained_(nn.Sequential(nn.Linear(4, 4)), torch.full((2, 4), 1e30))


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
    model = PARENTS["resnet20"].trained(DATA, "cpu")
    data = load_data(f"cifar10:{DATA / 'cifar10'}", batch=500)
    some = [next(iter(data.val))]
    right, count = accuracy(model, some)
    assert count == 500
    assert right == pytest.approx(0.910, abs=0.002), "of these images; 0.9173 of all"
    graph = surgery.trace(model, some[0][0][:2])
    keep = {g.name: torch.arange(g.units) >= g.units // 8 for g in graph.groups}
    small = surgery.cut(model, graph, keep)
    assert surgery.check_equal(surgery.mask(model, graph, keep), small, some[0][0][:16]) < 1e-5
    assert accuracy(small, some)[0] == accuracy(surgery.mask(model, graph, keep), some)[0]
