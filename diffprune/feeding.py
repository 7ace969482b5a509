"""What a training loop is fed with and what a network answers: looked at, or refused."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffprune.errors import BadData, first_line

Batches = Iterable[Any]
"""Re-iterable batches: (inputs, labels), or inputs alone or as (inputs,), which are learned from by distillation."""

FITTING = "give batches of images (N, C, H, W) with the channels, size and dtype that the network was built for"

MOST_BATCHES = 1_000_000
"""Of an epoch: what gives more never ends."""


def unpack(batch: Any, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Inputs and labels of a batch, on `device`. Raises BadData for what is neither, and for a batch of nothing."""
    parts = (batch,) if isinstance(batch, Tensor) else batch
    match parts:
        case (Tensor() as inputs, *_) if not inputs.numel():
            raise BadData(
                f"a batch holds inputs of shape {tuple(inputs.shape)}",
                at="the first batch of that form",
                effect="the run was stopped",
                fix="leave empty batches out of the loader",
            )
        case (Tensor() as inputs,) | (Tensor() as inputs, None):
            return inputs.to(device), None
        case (Tensor() as inputs, Tensor() as labels):
            return inputs.to(device), (labels if labels.is_floating_point() else labels.long()).to(device)
    raise BadData(
        f"a batch is {_shape(parts)}; (inputs, labels), (inputs,) or inputs are asked, as tensors",
        at="the first batch of that form",
        effect="the run was stopped",
        fix="wrap the loader so that it yields one of these",
    )


def _shape(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__} of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
    return type(batch).__name__


def endless(batches: Batches) -> Iterator[Any]:
    """One epoch after the other. Raises BadData for an empty one."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise BadData(
                "the training batches are empty, or can be read only once",
                at="the start of an epoch",
                effect="the run was stopped",
                fix="give at least one batch, in a list, DataLoader or other object that can be iterated again",
            )


def ending(batches: Batches) -> Iterator[Any]:
    """One epoch. Raises BadData for one of more than MOST_BATCHES."""
    for number, batch in enumerate(batches):
        if number == MOST_BATCHES:
            raise BadData(
                f"an epoch does not end after {number:,} batches",
                at="a loader that gives its batches again and again, as it seems",
                effect="the run was stopped",
                fix="end its iterator after each epoch (with itertools.islice, say)",
            )
        yield batch


def logits(output: object) -> Tensor:
    """What a network gave, if it is a tensor of shape (N, classes). Raises BadData."""
    if isinstance(output, Tensor) and output.dim() == 2:
        return output
    given = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise BadData(
        f"the network returns {given}; logits of shape (N, classes) are asked",
        at="its forward, which may differ between training and eval mode",
        effect="the run was stopped",
        fix="wrap it in a module that returns the logits alone",
    )


def answered(model: nn.Module, inputs: Tensor, *, at: str, effect: str, fix: str) -> Any:
    """What the network gives for `inputs`. Raises BadData if it does not run on them."""
    try:
        return model(inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        fact = f"the network does not take images of {tuple(inputs.shape[1:])} in {inputs.dtype}: {first_line(error)}"
        raise BadData(fact, at=at, effect=effect, fix=fix) from error


def out_of_range(labels: Tensor, classes: int) -> str:
    """What is wrong with class indices that the network has no output for; nothing if it has."""
    if not len(labels) or 0 <= labels.min() <= labels.max() < classes:
        return ""
    return f"labels go from {labels.min()} to {labels.max()}; the network tells {classes} classes apart"


def require_labels(
    labels: Tensor, examples: int, classes: int, *, at: str = "the first training batches",
    effect: str = "nothing was started",
) -> None:
    """Labels to train on are one of the classes for each example, or shares of all. Raises BadData."""
    whole = not (labels.is_floating_point() or labels.is_complex())
    if labels.shape != ((examples,) if whole else (examples, classes)):
        fact = f"labels are {labels.dtype} of shape {tuple(labels.shape)} for {examples} inputs and {classes} classes"
    elif not whole or not (fact := out_of_range(labels, classes)):
        return
    raise BadData(
        fact,
        at=at,
        effect=effect,
        fix="give class indices (N,) from 0 on, or shares (N, classes), and a network with an output for each class",
    )
