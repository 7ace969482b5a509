"""Names that the exporter took from weights, given back."""

from collections import defaultdict

import numpy as np
import onnx_ir as ir
from torch import nn

TRANSPOSED = ".T"
"""What the name of a weight ends in whose file holds it with its two axes exchanged."""


def name_transposed_(model: ir.Model, network: nn.Module) -> None:
    """Call every weight of `network` that the exporter transposed after itself, as "fc.weight.T" in place of "val_7".

    The exporter transposes the weights of linear layers between more than two axes, and numbers them anew.
    """
    kept = model.graph.initializers
    lost = defaultdict(list)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 2 and name not in kept:
            lost[tuple(parameter.shape[::-1])].append((name, parameter.detach().cpu()))
    for value in list(kept.values()):
        if value.const_value is None or not (candidates := lost.get(tuple(value.const_value.shape.numpy()))):
            continue
        matrix = value.const_value.numpy()
        found = next((entry for entry in candidates if np.array_equal(entry[1].numpy().T, matrix)), None)
        if found is not None:
            candidates.remove(found)
            value.name = found[0] + TRANSPOSED
