"""The images that a network is looked at with before it is trained, and the data that they come from, checked."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from diffprune.errors import BadData
from diffprune.feeding import FITTING, Batches, answered, ending, endless, logits, require_labels, unpack

CALIBRATION = 1000
"""Images that the cut layers are fitted to; twice as many gain 0.2 points (docs/experiments.md)."""

ELEMENTS = 1 << 24
"""Values that these images may have together: 1000 of CIFAR's, 111 of 3 x 224 x 224."""


def calibration(train: Batches, parent: nn.Module, device: torch.device) -> tuple[Tensor, Iterator[Any]]:
    """Inputs of the first batches, and all batches, these first: images that are looked at are trained on in turn.

    CALIBRATION inputs, or as many as ELEMENTS allow, of one size, at least one batch and at most one epoch. Raises
    BadData, for labels that the network has no output for as well, and for a network that writes into its input.
    """
    epoch, classes = iter(train), 0
    seen: list[Any] = []
    parts: list[Tensor] = []
    for batch in epoch:
        inputs, labels = unpack(batch, device)
        classes = classes or _classes(parent, inputs)
        if labels is not None:
            require_labels(labels, len(inputs), classes)
        seen.append(batch)
        if parts and inputs.shape[1:] != parts[0].shape[1:]:
            break
        parts.append(inputs)
        wanted = min(CALIBRATION, ELEMENTS // max(inputs.shape[1:].numel(), 1))
        if sum(map(len, parts)) >= wanted:
            break
    if not parts:
        raise _bad_data("the training data is empty", "give at least one training batch")
    return torch.cat(parts)[: max(wanted, len(parts[0]))], chain(seen, epoch, endless(train))


def _classes(parent: nn.Module, inputs: Tensor) -> int:
    """How many the network tells apart. Raises BadData if it writes into its input: others read the same images."""
    given = inputs[:2].clone()
    with torch.no_grad(), surgery.evaluating(parent):
        classes = logits(answered(parent, given, at="compress", effect="nothing was started", fix=FITTING)).shape[1]
    if not ((given == inputs[:2]) | (given != given)).all():
        raise _bad_data("the network writes into its input", "write x = x - mean in forward in place of x.sub_(mean)")
    return classes


def refuse_iterators(**batches: Batches) -> None:
    """Both are read several times; what can be read only once would be found empty in the middle of a run."""
    for name, given in batches.items():
        if isinstance(given, Iterator):
            raise _bad_data(
                f"{name} is a {type(given).__name__}, which can be read only once",
                "give a list, a DataLoader or another object that can be iterated again",
            )


def _bad_data(fact: str, fix: str) -> BadData:
    return BadData(fact, at="compress", effect="nothing was started", fix=fix)


def length(train: Batches) -> int:
    """Batches in an epoch. Loaders of iterable data sets have a __len__ that raises."""
    try:
        return len(train)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in ending(train))
