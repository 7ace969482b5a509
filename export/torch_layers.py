"""The layers of a network in torch, by the clock: for targets that run no ONNX file."""

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from export.layer_kinds import LayerKind, TimedLayer, Widths
from export.layer_networks import CONVOLUTIONS, fastest
from export.layer_table import layer_table
from export.networks import network_candidate, torch_as_asked
from export.settings import Settings
from export.tensors import Examples, example_tuple, repeat_to, resting_copy


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
    seen, wanted = _called(model, example_inputs, settings.batch), defaultdict[LayerKind, list[Widths]](list)
    for layer in seen:
        wanted[layer.kind].append(layer.widths)
    alone = layer_table(wanted, settings)
    with torch_as_asked(settings):
        whole = fastest(network_candidate(model, example_inputs, settings), settings)
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
