"""The page about speed-ups shows the committed results of pruning times quantization, refusals included."""

from pathlib import Path

from benchmarks import quantization
from benchmarks.cells import stored


def test_committed_results_give_their_table() -> None:
    _, results = stored(quantization.RESULTS)
    assert quantization.table(results) in (Path(__file__).parents[1] / "docs" / "latency.md").read_text()
    assert len(results) == len(quantization.NAMES) * (len(quantization.NETWORKS) * len(quantization.PRECISIONS) - 1)


def test_a_refusal_takes_the_place_of_numbers() -> None:
    cell = {"model": "resnet18", "network": "dense", "precision": "fp16", "refused": "the file is wrong"}
    line = quantization.table([cell]).splitlines()[2]
    assert line.count("|") == 10
    assert "refused: the file is wrong" in line
