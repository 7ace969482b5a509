"""What the documentation says that gates cost is what was measured."""

from pathlib import Path

from benchmarks import overhead
from benchmarks.cells import stored


def test_committed_results_give_their_table() -> None:
    table = overhead.table(stored(overhead.RESULTS)[1])
    assert table in (Path(__file__).parents[1] / "docs" / "experiments.md").read_text()
    assert len(table.splitlines()) == 2 + len(overhead.NETWORKS)
