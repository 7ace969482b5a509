"""The page about speed-ups shows the committed results, and these kept the promise or say that they did not."""

from pathlib import Path

from benchmarks import latency
from benchmarks.cells import stored
from diffprune.stopwatch import EXCESS


def test_committed_results_give_their_table() -> None:
    _, results = stored(latency.RESULTS)
    assert latency.table(results) in (Path(__file__).parents[1] / "docs" / "latency.md").read_text()


def test_what_was_asked_was_measured_before_it_was_reported() -> None:
    _, results = stored(latency.RESULTS)
    ours = [r for r in results if r["method"] == "diffprune" and "refused" not in r]
    assert len(ours) >= 10
    for r in ours:
        best = min((t["speedup"] for t in r["tries"] if t["speedup"] >= r["asked"]), default=None)
        assert best is not None, (r["network"], r["asked"])
        assert best <= (1 + EXCESS) * r["asked"] or len(r["tries"]) > 1
