"""Parameters and multiply-adds counted on a running network; shares no code with surgery."""

from typing import Any

import torch
import torch.nn.functional as F
from oracle import READERS, run
from torch import nn
from torch.overrides import TorchFunctionMode


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, x: Any) -> int:
    """Per example, of convolutions and linear layers: outputs times the inputs that each of them sums over."""
    counter = _Counter()
    with torch.no_grad(), counter:
        run(model, x)
    leaf = next(t for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, torch.Tensor))
    assert counter.total % leaf.shape[0] == 0
    return counter.total // leaf.shape[0]


class _Counter(TorchFunctionMode):
    total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in READERS:
            weight = args[1]
            transposed = func is not F.linear and "transpose" in func.__name__
            summed = weight[:, 0].numel() // weight.shape[0] if transposed else weight[0].numel()
            pixels = args[0].numel() * weight.shape[1] if transposed else result.numel()
            self.total += pixels * summed
        return result
