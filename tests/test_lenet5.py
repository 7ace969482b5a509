"""The LeNet-5 benchmark's own parts."""

from pathlib import Path

import torch

from benchmarks import lenet5
from benchmarks.cells import stored
from surgery import SizeModel, trace


def test_the_network_is_that_of_the_literature() -> None:
    size = SizeModel(trace(lenet5.lenet5().eval(), torch.randn(2, 1, 28, 28))).dense
    assert (size.params, size.macs) == (431_080, 2_293_000)


def test_images_are_shifted_by_up_to_two_pixels_and_labels_stay() -> None:
    image = torch.full((1, 1, 28, 28), -1.0)
    image[0, 0, 14, 14] = 2.0
    batches = lenet5.Shifted([(image.expand(200, -1, -1, -1), torch.arange(200))], seed=0)
    ((images, labels),) = batches
    assert torch.equal(labels, torch.arange(200))
    places = (images[:, 0] == 2).nonzero()
    assert len(places) == 200
    assert set(places[:, 1].tolist()) == set(places[:, 2].tolist()) == {12, 13, 14, 15, 16}
    assert images.min() == -1


def test_the_table_has_one_line_for_each_budget() -> None:
    cell = {"macs": 0.2, "error": 0.006, "widths": [5, 10, 50], "left_macs": 4e5, "left_params": 3e4, "minutes": 2.0}
    lines = lenet5.table([cell, {**cell, "error": 0.008}, {**cell, "macs": 0.05}]).splitlines()
    assert lines[2] == "| 5.0x | 0.70 ± 0.14 | 5-10-50, 5-10-50 | 400 k | 30.0 k | 2.0 |"
    assert len(lines) == 4


def test_committed_results_give_their_table() -> None:
    _, results = stored(lenet5.RESULTS)
    assert lenet5.table(results) in (Path(__file__).parents[1] / "README.md").read_text()
