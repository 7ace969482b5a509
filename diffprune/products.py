"""Gated weights, of which large ones exist only while an operator reads them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffprune.errors import GatesLost

DESCRIPTIONS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "requires_grad", "ndim")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex,
}  # fmt: skip
"""What is asked of a tensor without reading its values."""

SMALL = 1 << 16
"""Elements up to which a product is kept for the backward pass: computing it again costs more than its memory."""

Live = dict[tuple[int, torch.dtype], str]
"""Which name is computed in the storage at an address, now, but for what is SMALL."""


class Product(Tensor):
    """Stands for a weight times its gates: it has no values, every operator that gets it gets a fresh product instead.

    Whatever would pass it by without torch's overrides fails, for there is nothing to read.
    """

    key: str
    differentiable: bool
    compute: Callable[[str], Tensor]
    live: Live

    @staticmethod
    def of(weight: Tensor, name: str, compute: Callable[[str], Tensor], live: Live) -> "Product":
        product: Product = Tensor._make_wrapper_subclass(
            Product, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=True
        )
        product.key, product.compute, product.live = name, compute, live
        product.differentiable = torch.is_grad_enabled()
        return product

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is torch._cudnn_rnn_flatten_weight:  # only lays the weights side by side, to be read faster
            return None
        used: list[tuple[Live, tuple[int, torch.dtype]]] = []

        def computed(product: Product) -> Tensor:
            if product.differentiable and not torch.is_grad_enabled():
                raise GatesLost(
                    "a weight is read without gradients in a forward that has them elsewhere",
                    at=f"{product.key}, by {getattr(func, '__name__', func)}",
                    effect="the search was stopped: what is computed again in the backward pass would be without gates",
                    fix="switch activation checkpointing off in this network",
                )
            value = product.compute(product.key)
            if value.numel() > SMALL:
                used.append((product.live, _place(value)))
                product.live[_place(value)] = product.key
            return value

        given = {name: _filled(value, computed) for name, value in (kwargs or {}).items()}
        try:
            return func(*_filled(args, computed), **given)
        finally:  # soon something else will lie there
            for live, place in used:
                live.pop(place, None)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} reads a gated weight past torch's overrides")


@contextmanager
def products(
    weights: Mapping[str, Tensor], places: Mapping[str, str], compute: Callable[[str], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Stand-ins for the `weights` at their `places`: where one is read inside, `compute` is asked for it by name.

    Only what is SMALL is kept for the backward pass, which asks for all else again: kept, it would double the memory of
    all weights that are read through gates.
    """
    live: Live = {}

    def pack(saved: Tensor) -> Any:
        name = live.get(_place(saved))
        if name is None:
            return saved, saved._version
        return weights[name], weights[name]._version, name, saved.shape, saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> Tensor:
        read: Tensor
        read, version, *rest = packed
        if read._version != version:  # torch does not look where there are hooks
            raise RuntimeError(
                f"{rest[0] if rest else f'a tensor of shape {tuple(read.shape)}'} was changed in place between the "
                "forward pass that read it and this backward pass, whose gradient would be that of other values: "
                "call backward() before the optimizer's step()"
            )
        if not rest:
            return read
        name, shape, stride, offset = rest
        with torch.no_grad():
            return compute(name).as_strided(shape, stride, offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        made = {name: Product.of(weight, name, compute, live) for name, weight in weights.items()}
        yield {place: made[name] for place, name in places.items()}


def places_of(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Wherever `model` holds the weights of these names, by one name for each place, and whose it is.

    `functional_call` takes a module that has two names for two modules with tied weights, and leaves a stand-in in it.
    """
    owners = {id(model.get_parameter(name)): name for name in names}
    return {
        f"{path}.{name}".lstrip("."): owners[id(weight)]
        for path, module in model.named_modules()
        for name, weight in module._parameters.items()
        if id(weight) in owners
    }


def _filled(value: Any, computed: Callable[[Product], Tensor]) -> Any:
    """`value`, an argument of an operator, with what is computed in place of the products in it."""
    if isinstance(value, Product):
        return computed(value)
    return type(value)(_filled(v, computed) for v in value) if type(value) in (list, tuple) else value


def _place(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage().data_ptr(), tensor.dtype
