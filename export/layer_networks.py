"""Single layers in torch, by the clock: for targets that run no ONNX file."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from export.candidates import Candidate
from export.clocks import clock_for
from export.layer_kinds import LayerKind, Widths
from export.layers import RUNS
from export.networks import network_candidate, torch_as_asked
from export.settings import Settings

WARM_UP = 3

IN_A_ROW = 20
"""Times that a layer is computed in one run: starting a run on a GPU takes as long as a small layer does."""

CONVOLUTIONS: dict[tuple[str, int], type[nn.Module]] = {
    ("Conv", 1): nn.Conv1d, ("Conv", 2): nn.Conv2d, ("Conv", 3): nn.Conv3d,
    ("ConvTranspose", 1): nn.ConvTranspose1d, ("ConvTranspose", 2): nn.ConvTranspose2d,
    ("ConvTranspose", 3): nn.ConvTranspose3d,
}  # fmt: skip


def in_torch(kind: LayerKind, pairs: Sequence[Widths], settings: Settings) -> Iterator[dict[Widths, float]]:
    """Milliseconds of a layer of a kind at `pairs` of widths, the fastest of RUNS."""
    if pairs:
        with torch_as_asked(settings):
            yield {widths: _alone(kind, widths, settings) for widths in pairs}


def _alone(kind: LayerKind, widths: Widths, settings: Settings) -> float:
    with torch.random.fork_rng(devices=[]):  # both are made on the CPU
        layer, x = single_layer(kind, widths, settings.batch)
    return fastest(network_candidate(InARow(layer), x, replace(settings, batch=len(x))), settings) / IN_A_ROW


def fastest(candidate: Candidate, settings: Settings) -> float:
    """Milliseconds of the fastest of RUNS runs: other work only adds."""
    timer = clock_for(settings).timer
    return min([timer(candidate.run, 1) for _ in range(WARM_UP + RUNS)][WARM_UP:])


class InARow(nn.Module):
    """A layer, IN_A_ROW times on the same input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(IN_A_ROW - 1):
            self.layer(x)
        y: Tensor = self.layer(x)
        return y


def single_layer(kind: LayerKind, widths: Widths, batch: int) -> tuple[nn.Module, Tensor]:
    """A layer of a kind, and noise for it."""
    inside, outside = widths
    if kind.op == "MatMul":
        return nn.Linear(inside, outside, bias=False), torch.randn(kind.positions[0], inside)
    sides = len(kind.kernel)
    given = {"strides": (1,) * sides, "dilations": (1,) * sides, "pads": (0,) * sides, **dict(kind.attributes)}
    options: dict[str, Any] = {"stride": given["strides"], "dilation": given["dilations"]}
    options["padding"] = given["pads"][:sides]
    if "output_padding" in given:
        options["output_padding"] = given["output_padding"]
    layer = CONVOLUTIONS[kind.op, sides]
    network = layer(inside, outside, kind.kernel, groups=kind.groups or inside, bias=False, **options)
    return network, torch.randn(batch, inside, *kind.positions)
