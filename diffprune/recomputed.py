"""Products that are cheap to compute again are not kept for the backward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def recomputed(products: Mapping[str, Tensor], again: Callable[[str], Tensor]) -> Iterator[None]:
    """Of the `products` and views of them, autograd saves the name inside; the backward asks `again(name)`.

    Gated weights would otherwise double the memory of all weights that are read through gates.
    """
    # the graph keeps the two functions, so they must not hold the products
    names = {(p.untyped_storage().data_ptr(), p.dtype): name for name, p in products.items() if p.requires_grad}

    def pack(saved: Tensor) -> Any:
        name = names.get((saved.untyped_storage().data_ptr(), saved.dtype))
        return saved if name is None else (name, saved.shape, saved.stride(), saved.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        name, shape, stride, offset = packed
        with torch.no_grad():
            return again(name).as_strided(shape, stride, offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
