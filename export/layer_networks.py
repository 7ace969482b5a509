"""The layers of a network in torch, and single layers alone, by the clock: for targets that run no ONNX file."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from export.candidates import Candidate
from export.clocks import clock_for
from export.layer_kinds import LayerKind, TimedLayer, Widths
from export.layers import RUNS
from export.networks import network_candidate, torch_as_asked
from export.settings import Settings
from export.tensors import Examples, example_tuple, repeat_to, resting_copy

WARM_UP = 3

IN_A_ROW = 20
"""Times that a layer is computed in one run: starting a run on a GPU takes as long as a small layer does."""

CONVOLUTIONS: dict[tuple[str, int], type[nn.Module]] = {
    ("Conv", 1): nn.Conv1d, ("Conv", 2): nn.Conv2d, ("Conv", 3): nn.Conv3d,
    ("ConvTranspose", 1): nn.ConvTranspose1d, ("ConvTranspose", 2): nn.ConvTranspose2d,
    ("ConvTranspose", 3): nn.ConvTranspose3d,
}  # fmt: skip


def network_layers(model: nn.Module, example_inputs: Examples, settings: Settings) -> tuple[list[TimedLayer], float]:
    """The convolutions and linear layers that a network calls, in their order, and the milliseconds of all the rest.

    Each layer takes what it does alone; the rest is what the whole network takes beyond that. Where all of them alone
    take longer than the whole, they are shortened by one factor, and nothing is left for the rest. What no module of
    torch's computes, such as the projections inside nn.MultiheadAttention, and what pads with a word belongs to it.

    Raises:
        NotExportable: no usable example inputs, or a network that cannot be copied.
        CannotMeasure: the runtime does not run the network.
        DeviceMissing: no such device here.
    """
    seen = _called(model, example_inputs, settings.batch)
    with torch_as_asked(settings):
        whole = _fastest(network_candidate(model, example_inputs, settings), settings)
        alone = {key: _alone(*key, settings) for key in dict.fromkeys((layer.kind, layer.widths) for layer in seen)}
    layers = [replace(layer, ms=alone[layer.kind, layer.widths]) for layer in seen]
    total = sum(layer.ms for layer in layers)
    factor = min(1.0, whole / total) if layers else 1.0
    return [replace(layer, ms=factor * layer.ms) for layer in layers], max(whole - total, 0.0)


def _called(model: nn.Module, example_inputs: Examples, batch: int) -> list[TimedLayer]:
    """Layers whose time is not known yet."""
    network, found = resting_copy(model), list[TimedLayer]()

    def note(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            if what := _kind(module, args[0] if args else named["input"], output):
                found.append(TimedLayer(*what, f"{name}.weight".lstrip("."), tuple(output.shape), math.nan))

        return hook

    kinds: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS.values())
    for name, module in network.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(note(name), with_kwargs=True)
    with torch.no_grad():
        network(*(repeat_to(example, batch) for example in example_tuple(example_inputs)))
    return found


def _kind(module: Any, x: Tensor, output: Tensor) -> tuple[LayerKind, Widths] | None:
    if isinstance(module, nn.Linear):
        kind = LayerKind("MatMul", (), (), 1, (math.prod(output.shape[:-1]),))
        return kind, (module.in_features, module.out_features)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return None
    attributes = [("strides", module.stride), ("pads", module.padding * 2), ("dilations", module.dilation)]
    if module.transposed:
        attributes.append(("output_padding", module.output_padding))
    widths = module.in_channels, module.out_channels
    depthwise = module.groups > 1 and module.groups == widths[0] and widths[1] == widths[0]
    op = "ConvTranspose" if module.transposed else "Conv"
    groups = 0 if depthwise else module.groups
    return LayerKind(op, module.kernel_size, tuple(attributes), groups, tuple(x.shape[2:])), widths


def in_torch(kind: LayerKind, pairs: Sequence[Widths], settings: Settings) -> Iterator[dict[Widths, float]]:
    """Milliseconds of a layer of a kind at `pairs` of widths, the fastest of RUNS."""
    if pairs:
        with torch_as_asked(settings):
            yield {widths: _alone(kind, widths, settings) for widths in pairs}


def _alone(kind: LayerKind, widths: Widths, settings: Settings) -> float:
    with torch.random.fork_rng(devices=[]):  # both are made on the CPU
        layer, x = single_layer(kind, widths, settings.batch)
    return _fastest(network_candidate(InARow(layer), x, replace(settings, batch=len(x))), settings) / IN_A_ROW


def _fastest(candidate: Candidate, settings: Settings) -> float:
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
