"""What a run on names saw. Plain data."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.graph import Layer
from surgery.names import Names


@dataclass(frozen=True)
class State:
    """A parameter or buffer of the network, by qualified name. Tied ones share the name of the first."""

    name: str
    shape: torch.Size
    value: Tensor

    def numel(self) -> int:
        return self.shape.numel()


@dataclass
class Axis:
    """What a run saw along one axis of a tensor: how it is used, and the name at each index."""

    role: str
    names: Tensor


@dataclass(frozen=True)
class Doubt:
    """A number or constant of the forward that may not follow a cut.

    `key` is the operator with its lines of code, from the one that runs to that of the forward around it, the same in
    every block that runs them; `names` those of the
    result; `sizes` what was spelled out per axis of the result (-1: left open) by the code of the module `owner`.
    A doubt `of_values` is about the numbers `constants` that the channels meet, for they may belong to the width; each
    broadcasts to the result. All other doubts are about shapes and places; `given` are the widths, as names of shape
    (channels,), that came into `owner`: a number that the code spells out may have been read off one of them.
    """

    key: str
    text: str
    names: Tensor
    sizes: tuple[int, ...]
    owner: str
    of_values: bool = False
    constants: tuple[Tensor, ...] = ()
    given: tuple[Tensor, ...] = ()


@dataclass
class Node:
    """An operator that depends on the model's inputs: on which nodes, and along which axes its weights read."""

    sources: tuple[int, ...]
    reads: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class Observed:
    """Everything a run saw. `axes` counts sizes that modules remember as tensors of one axis.

    `nodes` are the operators in order, `ends` those that give the model's outputs. `boxed` are the values that black
    boxes got from the modules that they call, with the names of these. `computed`: the run depends on values;
    `mutated`: it writes into tensors in place. `owned` are the ids of the network's parameters and buffers. `fixed` are
    the multiply-adds per example of layers that are not followed, by module.
    """

    names: Names = field(default_factory=Names)
    axes: dict[tuple[str, int], Axis] = field(default_factory=dict)
    elements: dict[str, Tensor] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    doubts: list[Doubt] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    fixed: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    output: Any = None
    output_names: list[Tensor] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    boxed: list[tuple[str, Tensor]] = field(default_factory=list)
    computed: bool = False
    mutated: bool = False
    unseen: list[str] = field(default_factory=list)
    owned: frozenset[int] = frozenset()
