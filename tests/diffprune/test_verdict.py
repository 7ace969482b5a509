"""The sentence about a run: no claim that was not measured."""

from typing import Any

import pytest

from diffprune.verdict import missed, speed_in_words, verdict


@pytest.mark.parametrize(
    ("ratio", "low", "high", "words"),
    [
        (2.314, 2.21, 2.43, "2.31x faster (2.21x to 2.43x)"),
        (1.004, 1.002, 1.006, "1.004x faster (1.002x to 1.006x)"),
        (1.05, 0.98, 1.12, "not measurably faster or slower (0.980x to 1.12x)"),
        (1.1, 1.0, 1.2, "not measurably faster or slower (1.000x to 1.20x)"),
        (1.3, 0.98, 1.7, "not measurably faster or slower: too noisy to tell (0.980x to 1.70x)"),
        (0.8, 0.4, 1.0, "not measurably faster or slower: too noisy to tell (0.40x to 1.000x)"),
        (0.5, 0.4, 0.8, "2.00x slower (1.25x to 2.50x)"),
    ],
)
def test_faster_or_slower_only_if_the_whole_interval_says_so(ratio: float, low: float, high: float, words: str) -> None:
    assert speed_in_words(ratio, low, high) == words


def report(*, dense: float, pruned: float) -> dict[str, Any]:
    return {
        "accuracy": {"dense": dense, "pruned": pruned},
        "macs": {"dense": 1000, "pruned": 504},
        "latency": {"cpu": {"speedup": 2.0, "low": 1.9, "high": 2.1}},
    }


@pytest.mark.parametrize(
    ("dense", "pruned", "words"),
    [
        (0.9, 0.8950, "0.50 points less accurate than its parent"),
        (0.9, 0.91, "1.00 points more accurate than its parent"),
        (0.9, 0.9, "exactly as accurate as its parent"),
    ],
)
def test_accuracy_and_macs_are_not_rounded_in_our_favour(dense: float, pruned: float, words: str) -> None:
    said = verdict(report(dense=dense, pruned=pruned))
    expected = "The pruned network is 2.00x faster (1.90x to 2.10x) on this CPU with 49.6 % fewer MACs, and "
    assert said == f"{expected}{words}."


@pytest.mark.parametrize(("kind", "asked", "said"), [("speedup", 2.2, 1), ("speedup", 2.05, 0), ("macs", 0.5, 0)])
def test_files_that_are_slower_than_asked_are_said_to_be(kind: str, asked: float, said: int) -> None:
    run = {**report(dense=0.9, pruned=0.9), "budget": {"kind": kind, "asked": asked, "reached": 2.24}}
    found = missed(run)
    assert len(found) == said
    for text in found:
        assert "2.20x was asked, and 2.24x measured while the cut was chosen" in text
        assert "but the final files are 2.00x faster" in text
