"""Attention with the axes, and in the memory, that the exporter takes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FourAxes(TorchFunctionMode):
    """Inside, attention over (..., tokens, channels) has four axes, all before the heads laid together."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attended(*args, **named)
        return func(*args, **named)


def attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **named: Any
) -> Tensor:
    """Attention over any number of axes before (heads, tokens, channels)."""
    lead, missing = query.shape[:-3], (0,) * (4 - query.dim())
    if missing:
        query, key, value = (x[(None,) * len(missing)] for x in (query, key, value))
    elif len(lead) > 1:
        query, key, value = (x.expand(*lead, *x.shape[-3:]).flatten(0, -4) for x in (query, key, value))
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
    found: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **named)
    # In the order of its axes, by a copy that no file has: what views it later could else not be traced.
    found = found.clone(memory_format=torch.contiguous_format)
    return found[missing] if missing else found.unflatten(0, lead)
