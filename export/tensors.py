"""What goes into a network and what comes out of it, as flat tuples of CPU tensors."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from export.errors import NotExportable

Examples = Tensor | Sequence[Tensor]

# What onnxruntime and numpy both can hold. bfloat16 and complex numbers are not among them.
EXCHANGEABLE = (
    torch.float32, torch.float64, torch.float16, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)


def example_tuple(example_inputs: Examples) -> tuple[Tensor, ...]:
    """The example inputs as detached CPU tensors, one per argument of `forward`; axis 0 of each is the batch.

    Raises:
        NotExportable: no tensor at all, something that is not a tensor, an unusual dtype, no batch axis, or batches
            of different size.
    """
    if isinstance(example_inputs, Mapping):
        raise NotExportable(
            "the example inputs are a mapping: files have their inputs in the order of forward's arguments",
            at=", ".join(map(str, example_inputs)), effect="nothing was written",
            fix="pass a tuple with one tensor per argument",
        )
    given = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    for position, tensor in enumerate(given):
        at = f"example input {position} of {len(given)}"
        if not isinstance(tensor, Tensor):
            raise NotExportable(
                f"an example input is a {type(tensor).__name__}, not a tensor",
                at=at, effect="nothing was written", fix="pass one tensor, or a tuple with one tensor per argument",
            )
        if tensor.dtype not in EXCHANGEABLE:
            raise NotExportable(
                f"an example input has dtype {tensor.dtype}", at=at, effect="nothing was written",
                fix="convert model and inputs with .float() before the export",
            )
        if tensor.dim() == 0 or tensor.numel() == 0:
            raise NotExportable(
                f"an example input of shape {tuple(tensor.shape)} has no batch, or no values", at=at,
                effect="nothing was written", fix="give every input a first axis, the batch, and sizes of at least 1",
            )
    batches = sorted({tensor.shape[0] for tensor in given})
    if len(batches) != 1:
        raise NotExportable(
            f"the example inputs have {len(batches)} different batch sizes: {batches}" if given else "no example input",
            at=f"{len(given)} example inputs", effect="nothing was written",
            fix="pass one tensor, or a tuple of tensors with the same size along axis 0",
        )
    return tuple(tensor.detach().to("cpu") for tensor in given)


def repeat_to(tensor: Tensor, batch: int) -> Tensor:
    """`tensor` (n, ...) repeated or shortened along axis 0 to (batch, ...)."""
    return tensor[torch.arange(batch) % tensor.shape[0]].contiguous()


def resting_copy(model: nn.Module) -> nn.Module:
    """A copy of the network on the CPU, in eval mode. A copy, so that mode, device and caches of the original stay.

    Raises:
        NotExportable: the network refuses to be copied, as the legacy `weight_norm` does.
    """
    try:
        return copy.deepcopy(model).to("cpu").eval()
    except Exception as error:
        raise NotExportable(
            f"the network cannot be copied: {type(error).__name__}: {error}",
            at=f"copy.deepcopy of {type(model).__name__}", effect="nothing was written; the model is unchanged",
            fix="remove what cannot be copied, e.g. with torch.nn.utils.remove_weight_norm",
        ) from error


def outputs_of(resting: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All tensors the network returns for `inputs`, in the order of its (nested) output; the random state is kept.

    Raises:
        NotExportable: the network does not run on `inputs`, or returns no tensor.
    """
    shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in inputs)
    at = f"{type(resting).__name__} called with {shapes}"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            returned = resting(*inputs)
    except Exception as error:
        raise NotExportable(
            f"the network does not run: {type(error).__name__}: {error}", at=at, effect="nothing was written",
            fix="pass example inputs that the network accepts at every batch size",
        ) from error
    tensors = tuple(leaf.detach() for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor))
    unusual = [tensor.dtype for tensor in tensors if tensor.dtype not in EXCHANGEABLE]
    if unusual:
        raise NotExportable(
            f"the network returns {unusual[0]}", at=at, effect="nothing was written",
            fix="convert it with .float() before the export",
        )
    if not tensors:
        raise NotExportable(
            f"the network returns {type(returned).__name__} without a tensor", at=at, effect="nothing was written",
            fix="return a tensor, or a tuple, list or dict of tensors",
        )
    return tensors
